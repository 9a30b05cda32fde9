"""How many steps a jump saved, by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.predict.steps_saved import LossRate, SavedSteps, corrected


def rate_of(*points):
    rate = LossRate()
    for step, loss in points:
        rate.add(step, loss)
    return rate


def test_nothing_is_known_before_two_points():
    assert rate_of().value() is None and rate_of((3, 5.0)).value() is None
    assert rate_of((3, 5.0)).saved(5.0, 4.0, 2) == 0.0 and rate_of((3, 5.0)).reward(5.0, 4.0, 3.0) == -1.0


def test_saved_is_the_fall_in_full_steps_less_those_made():
    rate = rate_of((10, 5.0), (20, 4.0))
    assert rate.value() == pytest.approx(0.1)
    assert rate.saved(4.0, 3.0, settle_steps=3) == pytest.approx(7.0)
    assert rate.saved(4.0, 3.9, settle_steps=3) == pytest.approx(-2.0)
    assert rate.saved(4.0, 4.2, settle_steps=3) == pytest.approx(-5.0)


def test_reward_is_the_gain_over_full_steps_at_the_same_cost():
    rate = rate_of((10, 5.0), (20, 4.0))
    assert rate.reward(4.0, 3.5, cost=5.0) == pytest.approx(0.0)
    assert rate.reward(4.0, 3.0, cost=5.0) == pytest.approx(1.0)
    assert rate.reward(4.0, 4.0, cost=5.0) == pytest.approx(-1.0)
    assert rate.reward(4.0, -90.0, cost=1.0) == 5.0 and rate.reward(4.0, 90.0, cost=1.0) == -2.0


@pytest.mark.parametrize("points", [[(0, 4.0), (10, 4.0)], [(0, 4.0), (10, 4.5)], [(0, 4.0), (5, 4.0), (9, 4.4)]])
def test_where_full_steps_bring_nothing_there_is_nothing_to_measure_by(points):
    rate = rate_of(*points)
    assert rate.value() <= 0
    assert rate.saved(4.0, 3.0, 2) == 0.0 and rate.reward(4.0, 3.0, 2.0) == -1.0


def test_loss_that_is_not_finite_saves_less_than_anything():
    rate = rate_of((0, 5.0), (10, 4.0))
    for after in (math.nan, math.inf):
        assert rate.saved(4.0, after, 2) == -math.inf and rate.reward(4.0, after, 2.0) == -2.0
    rate.add(20, math.nan)
    assert rate.points == [(0, 5.0), (10, 4.0)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1, 9), min_size=3, max_size=4), st.integers(1, 30))
def test_noise_never_makes_full_steps_look_slower(losses, apart):
    """As fast as numpy's line through the same points and its standard error: faster wherever they are off the line."""
    rate = rate_of(*((n * apart, loss) for n, loss in enumerate(losses)))
    steps = np.arange(len(losses)) * apart
    line, covariance = np.polyfit(steps, losses, 1, cov=True)
    assert rate.value() == pytest.approx(-line[0] + math.sqrt(covariance[0, 0]), abs=1e-9)
    if np.abs(losses - np.polyval(line, steps)).max() > 1e-3:
        assert rate.value() > -line[0] + 1e-6


def test_what_a_jump_gained_does_not_count_as_the_speed_of_full_steps():
    rate = rate_of((0, 5.0), (10, 4.0))
    rate.jumped(12, before=4.0, after=2.0, settle_steps=2)
    assert rate.value() == pytest.approx(0.1), "0.2 of the 2.0 are the two full steps'"
    rate.add(22, 1.0)
    assert rate.value() == pytest.approx(0.1)


def test_one_count_of_steps_has_one_point():
    rate = rate_of((0, 5.0), (10, 4.5), (10, 4.0))
    assert rate.points == [(0, 5.0), (10, 4.0)] and rate.value() == pytest.approx(0.1)


def test_state_is_json():
    rate, again = rate_of((0, 5.1), (10, 4.3), (15, 4.2)), LossRate()
    again.load_state_dict(json.loads(json.dumps(rate.state_dict())))
    assert again.points == rate.points and again.value() == rate.value()


def test_noise_of_single_tests_evens_out():
    """Tests that are off by +-3 steps around 0.7 saved: credited are the whole steps of the most they ever summed to."""
    rng, savings, credited = np.random.default_rng(0), SavedSteps(), 0
    saved = 0.7 + rng.uniform(-3, 3, 400)
    for steps in saved:
        savings.add(float(steps), 0.0)
        credited += savings.withdraw(8)
    assert credited == math.floor(saved.cumsum().max())
    assert savings.balance == pytest.approx(saved.sum() - credited)
    assert credited < 0.8 * np.maximum(saved, 0).sum(), "gains alone would have credited noise"


def test_progress_that_was_lost_is_made_good_before_anything_is_credited():
    savings = SavedSteps()
    savings.add(-5.0, 0.5)
    assert not savings.pays and savings.withdraw(10) == 0
    savings.add(4.0, 0.5)
    assert savings.withdraw(10) == 0
    savings.add(3.5, 0.5)
    assert savings.pays and savings.withdraw(10) == 2 and savings.balance == 0.5
    savings.add(9.0, 0.0)
    assert savings.withdraw(4) == 4 and savings.withdraw(10) == 5


def test_what_checking_cost_speaks_against_trying_again_but_is_not_taken_from_progress():
    savings = SavedSteps()
    savings.add(2.0, 2.5)
    assert not savings.pays and savings.withdraw(10) == 2
    savings.add(2.0, 1.0)
    assert savings.pays and savings.withdraw(10) == 2


def test_it_pays_while_the_last_attempts_bring_more_than_they_cost():
    savings = SavedSteps()
    for brought in (2.0, -0.5, -0.5, -0.5):
        savings.tried(brought)
        assert savings.pays
    savings.tried(-0.5)
    assert not savings.pays and savings.balance == 0
    again = SavedSteps()
    again.load_state_dict(json.loads(json.dumps(savings.state_dict())))
    assert again.state_dict() == savings.state_dict()


@pytest.mark.parametrize(
    ("after", "steps"),
    [(0.1, 8.0), (0.05, 10 * 0.1 / 0.0721348 - 2), (0.001, 10 * 0.1 / 0.0497068 - 2), (None, 8.0)],
)
def test_slower_steps_after_a_jump_by_hand(after, steps):
    """10 steps' fall, 2 of them made, at .1 per step before. Logarithmic means: .05 / ln 2 = .0721; a rate below a fifth of the
    one before counts as a fifth: .08 / ln 5 = .0497."""
    assert corrected(8.0, 2, 0.1, after) == pytest.approx(steps, rel=1e-5)
