"""Intervals hold what comes as often as they say; which method is believed, and why."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from scale.errors import UsageError
from scale.forecast.curve import Curve
from scale.forecast.interval import conformal_quantile, past_errors, rms
from scale.forecast.methods import METHODS, last_value
from scale.forecast.outlook import choose, look_ahead
from tests.forecast.synthetic import LAW, curve, factors, fast_law

LAWS = {name: method for name, method in METHODS.items() if name != "world model"}
"""The methods that are fast."""


def some_run(rng: np.random.Generator) -> tuple[Curve, float]:
    """A run with a law, a schedule and noise of its own, known up to 40% to 70%, and the mean loss at its end."""
    steps = int(rng.integers(400, 900))
    lr_T, warmup = factors(
        steps, kind=str(rng.choice(["wsd", "cosine", "linear", "constant"])), decay=float(rng.uniform(0.1, 0.4))
    )
    law = {
        "L0": rng.uniform(0.6, 1.6), "A": rng.uniform(2.5, 5), "alpha": rng.uniform(0.25, 0.5),
        "B": 0.35 * math.exp(0.6 * rng.standard_normal()), "C": 0.11 * math.exp(0.5 * rng.standard_normal()),
        "beta": rng.uniform(0.5, 0.7), "gamma": rng.uniform(0.5, 0.8),
    }  # fmt: skip
    whole = curve(fast_law(lr_T, warmup, law), lr_T, warmup, noise=0.04, seed=int(rng.integers(1 << 30)))
    return whole.until(round(rng.uniform(0.4, 0.7) * steps)), whole.measured(steps)


@pytest.mark.parametrize("runs", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_nine_of_ten_intervals_hold_the_loss(runs: int) -> None:
    rng = np.random.default_rng(5)
    inside, widths = [], []
    for _ in range(runs):
        known, truth = some_run(rng)
        best = look_ahead(known, methods=LAWS).best
        inside.append(best.lower <= truth <= best.upper)
        widths.append((best.upper - best.lower) / best.loss)
    assert 0.8 <= np.mean(inside) <= 1.0
    assert np.median(widths) < 0.3


def test_an_interval_is_wider_the_more_lies_ahead() -> None:
    lr_T, warmup = factors(800)
    whole = curve(fast_law(lr_T, warmup, LAW), lr_T, warmup, noise=0.04)
    early, late = (look_ahead(whole.until(step), methods=LAWS).best for step in (300, 760))
    assert early.spread > 2 * late.spread
    assert early.upper_M[-1] - early.lower_M[-1] > 1.5 * (early.upper_M[0] - early.lower_M[0])
    assert (early.lower, early.loss, early.upper) == (early.lower_M[-1], early.loss_M[-1], early.upper_M[-1])


def test_same_curve_same_numbers() -> None:
    lr_T, warmup = factors(400)
    known = curve(fast_law(lr_T, warmup, LAW), lr_T, warmup, noise=0.04).until(200)
    np.random.seed(1)
    first = look_ahead(known, methods=LAWS).best
    np.random.seed(2)
    assert look_ahead(known, methods=LAWS).best.upper == first.upper


def test_past_errors_of_the_last_value_by_hand() -> None:
    lr_T, _ = factors(200, kind="constant", warmup=0)
    loss_N = np.exp(-np.arange(1, 101) / 100)
    known = curve(np.concatenate([loss_N, np.ones(100)]), lr_T, 0).until(100)
    errors = past_errors(last_value, known, 0)
    means = {end: loss_N[end - known.window : end].mean() for end in (45, 55, 65, 75, 90, 100)}
    wanted = [math.log(means[45] / means[90])]
    for cut in (55, 65, 75):
        wanted.append(math.sqrt(math.log(2) / math.log(100 / cut)) * math.log(means[cut] / means[100]))
    np.testing.assert_allclose(errors, wanted, rtol=1e-12)
    assert rms([3.0, -4.0]) == math.sqrt(12.5) and rms([]) == 0


def test_conformal_quantile_by_hand() -> None:
    assert conformal_quantile([float(x) for x in range(1, 20)]) == 18.0  # ceil(20 * 0.9) = 18
    assert conformal_quantile([3.0, 1.0, 2.0]) == 3.0


def test_the_method_is_chosen_by_its_past() -> None:
    lr_T, warmup = factors(400)
    outlook = look_ahead(curve(fast_law(lr_T, warmup, LAW), lr_T, warmup, noise=0.03).until(250))
    assert list(outlook.forecasts) == list(METHODS) and outlook.chosen == "multi-power law"
    assert f"{outlook.best.past:.1%}" in outlook.reason
    first, second = outlook.best, outlook.forecasts["power law"]
    forecasts = {f.method: f for f in (replace(first, past=0.1), replace(second, past=0.048))}
    assert choose(forecasts, 0.01)[0] == "power law"
    assert choose(forecasts, 0.03)[0] == "multi-power law"  # 0.048 may be luck
    forecasts["power law"] = replace(second, past=0.051)
    assert choose(forecasts, 0.01)[0] == "multi-power law"
    forecasts["multi-power law"] = replace(first, past=math.nan)
    assert choose(forecasts, 0.01) == ("multi-power law", "too little past to compare methods on")


def test_nothing_ahead_and_too_little_behind() -> None:
    lr_T, warmup = factors(300)
    whole = curve(fast_law(lr_T, warmup, LAW), lr_T, warmup, noise=0.03)
    with pytest.raises(UsageError, match="nothing lies ahead"):
        look_ahead(whole)
    with pytest.raises(UsageError, match="a forecast needs"):
        look_ahead(whole.until(40))
    short = look_ahead(whole.until(64))
    assert list(short.forecasts) == list(LAWS) and "coarse moments" in short.left_out["world model"]
