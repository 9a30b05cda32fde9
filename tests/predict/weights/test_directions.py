"""Each direction against numpy in float64 over a trajectory that is known."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from scale.config.predict import DirectionName
from scale.errors import UsageError
from scale.parallel.ranks import Ranks
from scale.predict.weights.directions import drift, masked_slope, singular, window
from scale.predict.weights.directions.optimizer import LastUpdate
from scale.predict.weights.directions.table import DIRECTIONS
from scale.protocols import Shard
from tests.predict.weights.parts import SHAPES, drawn, feed, flat, made, shards_of, stacked, walk

COUNT = 30
STEPS = [1 + n % 3 for n in range(COUNT)]
LRS = [0.2 + 0.1 * (n % 5) for n in range(COUNT)]
TIME = np.cumsum([0.0, *LRS[1:]])


def test_every_name_of_the_config_has_a_class():
    assert set(DIRECTIONS) == set(get_args(DirectionName))
    assert all(name == direction.name for name, direction in DIRECTIONS.items())


@pytest.mark.parametrize("name", DIRECTIONS)
def test_all_find_the_straight_line_at_a_changing_learning_rate(name):
    start, speed = drawn(0), drawn(1, 0.01)
    speed["model.norm.weight"] *= 0.5
    one = {n: (v if v.dim() == 1 else torch.outer(v[:, 0], v[0])) for n, v in speed.items()}  # rank 1
    points = [{n: start[n] + t * one[n] for n in SHAPES} for t in TIME.tolist()]
    direction = made(DIRECTIONS[name])
    assert direction.vectors() is None
    feed(direction, points, STEPS, LRS)
    np.testing.assert_allclose(flat(direction.vectors()), flat(one.values()), rtol=2e-3, atol=3e-6)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_what_is_kept_is_what_is_said(name):
    direction = made(DIRECTIONS[name])
    kept = sum(len(tensors) for tensors in direction.tensors().values()) // len(SHAPES)
    assert kept == direction.copies + (name == "drift")


@pytest.mark.parametrize("name", ["window", "singular", "masked_slope"])
def test_after_a_restart_the_past_counts_no_more(name):
    direction, fresh = made(DIRECTIONS[name]), made(DIRECTIONS[name])
    feed(direction, walk(17), STEPS, LRS)
    direction.restart()
    for which in (direction, fresh):
        feed(which, walk(COUNT, seed=50), STEPS, LRS)
    assert all(map(torch.equal, direction.vectors(), fresh.vectors()))


def test_drift_is_the_weighted_mean_of_displacements():
    points, direction = walk(COUNT), made(drift.Drift)
    feed(direction, points, STEPS, LRS)
    units = np.diff(stacked(points), axis=0) / np.array(LRS[1:])[:, None]
    ages = np.cumsum([0, *STEPS[:0:-1]])[::-1]
    shares = drift.DECAY ** ages[1:] - drift.DECAY ** ages[:-1]
    np.testing.assert_allclose(flat(direction.vectors()), shares @ units / shares.sum(), rtol=1e-4, atol=1e-6)


def test_the_last_update_is_repeated():
    points, direction = walk(COUNT), made(LastUpdate)
    feed(direction, points, STEPS, LRS)
    last = stacked(points)[-2:]
    np.testing.assert_allclose(flat(direction.vectors()), (last[1] - last[0]) / LRS[-1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [20, 29, 30])
def test_window_means(count):
    points, direction, size = walk(COUNT)[:count], made(window.WindowMeans), window.LOOKS
    feed(direction, points, STEPS, LRS)
    end = count - count % size
    one, two = (slice(end - 2 * size, end - size), slice(end - size, end))
    moved = stacked(points)[two].mean(0) - stacked(points)[one].mean(0)
    by_hand = moved / (TIME[two].mean() - TIME[one].mean())
    np.testing.assert_allclose(flat(direction.vectors()), by_hand, rtol=1e-4, atol=2e-6)


def test_a_single_window_says_nothing():
    direction = made(window.WindowMeans)
    feed(direction, walk(19), STEPS, LRS)
    assert direction.vectors() is None


def regression(points, steps, times):
    """Slope and R^2 of every weight by numpy's polyfit, whose weights multiply residuals, and the weighted mean."""
    ages = np.cumsum([0, *steps[:0:-1]])[::-1]
    weights = masked_slope.DECAY**ages
    values = stacked(points)
    slope, offset = np.polyfit(times, values, 1, w=np.sqrt(weights))
    mean = weights @ values / weights.sum()
    left = weights @ (values - np.outer(times, slope) - offset) ** 2
    return slope, 1 - left / (weights @ (values - mean) ** 2), mean


def test_masked_slope_is_numpys_weighted_regression():
    points, direction = walk(COUNT), made(masked_slope.MaskedSlope)
    feed(direction, points, STEPS, LRS)
    slope, fit, mean = regression(points, STEPS, TIME)
    sure = abs(fit - masked_slope.LEAST_FIT) > 1e-4
    found = flat(direction.vectors())
    assert 5 < (fit > masked_slope.LEAST_FIT).sum() < len(fit) - 5
    assert ((found != 0) == (fit > masked_slope.LEAST_FIT))[sure].all()
    np.testing.assert_allclose(found[sure], np.where(fit > masked_slope.LEAST_FIT, slope, 0)[sure], rtol=1e-3)
    np.testing.assert_allclose(flat(direction.smoothed()), mean, rtol=1e-4, atol=1e-6)


def test_masked_slope_after_its_sums_were_rescaled():
    """After more steps than the power of two that old sums may be behind."""
    count = 90
    steps, lrs = [17] * count, [0.3] * count
    points, direction = walk(count, seed=4), made(masked_slope.MaskedSlope)
    feed(direction, points, steps, lrs)
    assert direction.scale > masked_slope._SMALLEST
    slope, fit, _ = regression(points, steps, 0.3 * np.arange(count))
    sure = abs(fit - masked_slope.LEAST_FIT) > 1e-3
    np.testing.assert_allclose(
        flat(direction.vectors())[sure], np.where(fit > masked_slope.LEAST_FIT, slope, 0)[sure], rtol=2e-3, atol=1e-7
    )


def test_weights_that_rest_have_no_slope():
    direction = made(masked_slope.MaskedSlope)
    feed(direction, [drawn(0)] * 12, STEPS, LRS)
    assert not flat(direction.vectors()).any()


def planted(spectrum):
    """Matrices of known singular values."""
    out = {}
    for name, tensor in drawn(6).items():
        out[name] = tensor
        if tensor.dim() == 2:
            u, s, v = torch.linalg.svd(tensor.double(), full_matrices=False)
            out[name] = (u * torch.tensor(spectrum)[: len(s)] @ v).float()
    return out


def test_singular_is_the_truncated_singular_value_decomposition():
    moved, start = planted([9.0, 4.0, 0.5, 0.3, 0.1]), drawn(0)
    times = np.linspace(0, 2.0, singular.LEAST_LOOKS + 1).tolist()
    points = [{n: start[n] + t / 2 * moved[n] for n in SHAPES} for t in times]
    direction = made(singular.Singular)
    feed(direction, points, [1] * len(points), [0.2] * len(points))
    for name, found in zip(SHAPES, direction.vectors(), strict=True):
        whole = moved[name].double().numpy()
        if whole.ndim == 2:
            u, s, v = np.linalg.svd(whole, full_matrices=False)
            whole = (u[:, :2] * s[:2]) @ v[:2]
        np.testing.assert_allclose(found.numpy(), whole / 2, rtol=1e-3, atol=1e-4)


def test_singular_moves_its_anchor_up():
    direction = made(singular.Singular)
    feed(direction, walk(singular.MOST_LOOKS + 2), [1] * 200, [1.0] * 200)
    assert direction.looks == 1 and direction.time == 1.0 and direction.vectors() is None


def test_singular_of_thin_and_resting_matrices():
    params = {"a.weight": torch.zeros(4, 1), "b.weight": torch.zeros(3, 6)}
    direction = singular.Singular(shards_of(params), Ranks())
    direction.observe(list(params.values()), None, 0, 0.0)
    for _ in range(singular.LEAST_LOOKS):
        direction.observe(list(params.values()), [torch.ones(4, 1), torch.zeros(3, 6)], 1, 1.0)
    thin, resting = direction.vectors()
    torch.testing.assert_close(thin, torch.ones(4, 1))
    assert not resting.any()


def test_singular_refuses_flat_shards_by_name():
    shards = {"w": Shard("w", torch.zeros(6), None, (3, 4), offset=6, flat=True)}
    with pytest.raises(UsageError, match=r"predict\.directions names 'singular'.*flat parts"):
        singular.Singular(shards, Ranks())
