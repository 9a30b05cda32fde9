"""Corrections that past jumps teach."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from scale.predict.residuals import CarryCorrection, Residuals


def test_the_ten_nearest_count_and_older_ones_less() -> None:
    store = Residuals(1)
    for i in range(12):
        store.add(step=100 * i, features_F=[float(i)], predicted=1.0, real=1.0 + i)
    weights = [0.95 ** (11 - i) for i in range(2, 12)]  # at step 1100, state 11: the states 2 to 11 are nearest
    expected = sum(w * i for w, i in zip(weights, range(2, 12), strict=True)) / sum(weights)
    assert store.correction(1100, [11.0]) == pytest.approx(expected, rel=1e-12)
    assert store.correction(1100, [0.0]) < 5


def test_it_halves_the_error_of_a_biased_prediction() -> None:
    rng, store = np.random.default_rng(0), Residuals(3)
    plain, corrected = [], []
    for step in range(400):
        x_F = rng.uniform(-1, 1, 3)
        predicted, real = 0.5, 0.5 + x_F[0] + 0.1 * rng.standard_normal()
        if step >= 200:
            plain.append(abs(real - predicted))
            corrected.append(abs(real - predicted - store.correction(step, x_F.tolist())))
        store.add(step, x_F.tolist(), predicted, real)
    assert np.mean(corrected) < 0.5 * np.mean(plain)


def test_capacity_state_and_refusals() -> None:
    store, other = Residuals(2, capacity=3), Residuals(2, capacity=3)
    assert store.correction(0, [0.0, 0.0]) == 0.0
    for i in range(5):
        store.add(i, [float(i), 0.0], 0.0, float(i))
    assert len(store) == 3 and store.residual_N.tolist() == [2.0, 3.0, 4.0]
    other.load_state_dict(json.loads(json.dumps(store.state_dict())))
    assert other.correction(9, [3.0, 0.1]) == store.correction(9, [3.0, 0.1])
    with pytest.raises(ValueError, match="finite"):
        store.add(6, [math.nan, 0.0], 0.0, 0.0)


def test_carry_corrections_find_kind_and_layer_within_bounds() -> None:
    carry = CarryCorrection()
    assert carry.factor("q", "3") == 1.0
    truth = {("q", "0"): 0.6, ("q", "1"): 0.9, ("up", "0"): 1.2, ("up", "1"): 1.8}
    for _ in range(60):
        carry.learn(truth | {("norm", "0"): math.nan})
    for (kind, layer), ratio in truth.items():
        assert carry.factor(kind, layer) == pytest.approx(ratio, rel=0.1)
    assert "norm" not in carry.kinds
    carry.learn({("q", "0"): 1e6})
    other = CarryCorrection()
    other.load_state_dict(json.loads(json.dumps(carry.state_dict())))
    for _ in range(200):
        other.learn({("q", "0"): 1e6, ("up", "0"): -1e6})
    assert 0.25 <= other.factor("up", "0") <= other.factor("q", "0") <= 2.0
    assert carry.factor("q", "1") != other.factor("q", "1")


def test_one_observation_moves_an_average_by_a_fifth() -> None:
    carry = CarryCorrection()
    carry.learn({("q", "0"): 1.5})
    assert carry.overall == pytest.approx(1.1)
    assert carry.kinds["q"] == pytest.approx(1 + 0.2 * (1.5 / 1.1 - 1))
