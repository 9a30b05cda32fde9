"""Each direction against numpy in float64 over a trajectory that is known."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from scale.config.predict import DirectionName
from scale.predict.weights import directions
from scale.predict.weights.directions import DIRECTIONS
from tests.predict.weights.parts import SHAPES, drawn, feed, flat, made, stacked, walk

COUNT = 30
STEPS = [1 + n % 3 for n in range(COUNT)]
LRS = [0.2 + 0.1 * (n % 5) for n in range(COUNT)]
TIME = np.cumsum([0.0, *LRS[1:]])


def test_every_name_of_the_config_has_a_class():
    assert set(DIRECTIONS) == set(get_args(DirectionName))


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
    assert kept == direction.copies


@pytest.mark.parametrize("name", ["masked_slope"])
def test_after_a_restart_the_past_counts_no_more(name):
    direction, fresh = made(DIRECTIONS[name]), made(DIRECTIONS[name])
    feed(direction, walk(17), STEPS, LRS)
    direction.restart()
    for which in (direction, fresh):
        feed(which, walk(COUNT, seed=50), STEPS, LRS)
    assert all(map(torch.equal, direction.vectors(), fresh.vectors()))


def test_the_smoothed_update_is_the_weighted_mean_of_displacements():
    points, direction = walk(COUNT), made(directions.SmoothedUpdate)
    feed(direction, points, STEPS, LRS)
    units = np.diff(stacked(points), axis=0) / np.array(LRS[1:])[:, None]
    ages = np.cumsum([0, *STEPS[:0:-1]])[::-1]
    shares = directions.DECAY ** ages[1:] - directions.DECAY ** ages[:-1]
    np.testing.assert_allclose(flat(direction.vectors()), shares @ units / shares.sum(), rtol=1e-4, atol=1e-6)


def test_the_last_update_is_repeated():
    points, direction = walk(COUNT), made(directions.LastUpdate)
    feed(direction, points, STEPS, LRS)
    last = stacked(points)[-2:]
    np.testing.assert_allclose(flat(direction.vectors()), (last[1] - last[0]) / LRS[-1], rtol=1e-4, atol=1e-6)


def regression(points, steps, times):
    """Slope and R^2 of every weight by numpy's polyfit, whose weights multiply residuals, and the weighted mean."""
    ages = np.cumsum([0, *steps[:0:-1]])[::-1]
    weights = directions.SLOPE_DECAY**ages
    values = stacked(points)
    slope, offset = np.polyfit(times, values, 1, w=np.sqrt(weights))
    mean = weights @ values / weights.sum()
    left = weights @ (values - np.outer(times, slope) - offset) ** 2
    return slope, 1 - left / (weights @ (values - mean) ** 2), mean


def test_masked_slope_is_numpys_weighted_regression():
    points, direction = walk(COUNT), made(directions.MaskedSlope)
    feed(direction, points, STEPS, LRS)
    slope, fit, mean = regression(points, STEPS, TIME)
    sure = abs(fit - directions.LEAST_FIT) > 1e-4
    found = flat(direction.vectors())
    assert 5 < (fit > directions.LEAST_FIT).sum() < len(fit) - 5
    assert ((found != 0) == (fit > directions.LEAST_FIT))[sure].all()
    np.testing.assert_allclose(found[sure], np.where(fit > directions.LEAST_FIT, slope, 0)[sure], rtol=1e-3)
    np.testing.assert_allclose(flat(direction.mean), mean, rtol=1e-4, atol=1e-6)


def test_masked_slope_after_its_sums_were_rescaled():
    """After more steps than the power of two that old sums may be behind."""
    count = 90
    steps, lrs = [17] * count, [0.3] * count
    points, direction = walk(count, seed=4), made(directions.MaskedSlope)
    feed(direction, points, steps, lrs)
    assert direction.scale > directions._SMALLEST
    slope, fit, _ = regression(points, steps, 0.3 * np.arange(count))
    sure = abs(fit - directions.LEAST_FIT) > 1e-3
    np.testing.assert_allclose(
        flat(direction.vectors())[sure], np.where(fit > directions.LEAST_FIT, slope, 0)[sure], rtol=2e-3, atol=1e-7
    )


def test_weights_that_rest_have_no_slope():
    direction = made(directions.MaskedSlope)
    feed(direction, [drawn(0)] * 12, STEPS, LRS)
    assert not flat(direction.vectors()).any()
