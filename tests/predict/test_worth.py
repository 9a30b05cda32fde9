"""What a jump was worth, by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.predict.worth import Account, Rate, cost_of_forward


def rate_of(*points):
    rate = Rate()
    for step, loss in points:
        rate.note(step, loss)
    return rate


def test_nothing_is_known_before_two_points():
    assert rate_of().value() is None and rate_of((3, 5.0)).value() is None
    assert rate_of((3, 5.0)).worth(5.0, 4.0, 2) == 0.0 and rate_of((3, 5.0)).reward(5.0, 4.0, 3.0) == -1.0


def test_worth_is_the_fall_in_full_steps_less_those_made():
    rate = rate_of((10, 5.0), (20, 4.0))
    assert rate.value() == pytest.approx(0.1)
    assert rate.worth(4.0, 3.0, relaxed=3) == pytest.approx(7.0)
    assert rate.worth(4.0, 3.9, relaxed=3) == pytest.approx(-2.0)
    assert rate.worth(4.0, 4.2, relaxed=3) == pytest.approx(-5.0)


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
    assert rate.worth(4.0, 3.0, 2) == 0.0 and rate.reward(4.0, 3.0, 2.0) == -1.0


def test_loss_that_is_not_finite_is_worth_less_than_anything():
    rate = rate_of((0, 5.0), (10, 4.0))
    for after in (math.nan, math.inf):
        assert rate.worth(4.0, after, 2) == -math.inf and rate.reward(4.0, after, 2.0) == -2.0
    rate.note(20, math.nan)
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
    rate.jumped(12, before=4.0, after=2.0, relaxed=2)
    assert rate.value() == pytest.approx(0.1), "0.2 of the 2.0 are the two full steps'"
    rate.note(22, 1.0)
    assert rate.value() == pytest.approx(0.1)


def test_one_count_of_steps_has_one_point():
    rate = rate_of((0, 5.0), (10, 4.5), (10, 4.0))
    assert rate.points == [(0, 5.0), (10, 4.0)] and rate.value() == pytest.approx(0.1)


def test_a_forward_is_a_third_of_a_step_on_as_many_tokens():
    assert cost_of_forward(512, 512) == pytest.approx(1 / 3)
    assert cost_of_forward(1024, 512) == pytest.approx(2 / 3) and cost_of_forward(512, 512, 0.5) == 0.5


def test_state_is_json():
    rate, again = rate_of((0, 5.1), (10, 4.3), (15, 4.2)), Rate()
    again.load_state_dict(json.loads(json.dumps(rate.state_dict())))
    assert again.points == rate.points and again.value() == rate.value()


def test_noise_of_single_verdicts_evens_out():
    """Verdicts of +-3 steps around a worth of 0.7: credited are the whole steps of the most they ever summed to."""
    rng, account, credited = np.random.default_rng(0), Account(), 0
    worths = 0.7 + rng.uniform(-3, 3, 400)
    for worth in worths:
        account.add(float(worth), 0.0)
        credited += account.withdraw(8)
    assert credited == math.floor(worths.cumsum().max())
    assert account.balance == pytest.approx(worths.sum() - credited)
    assert credited < 0.8 * np.maximum(worths, 0).sum(), "gains alone would have credited noise"


def test_progress_that_was_lost_is_made_good_before_anything_is_credited():
    account = Account()
    account.add(-5.0, 0.5)
    assert not account.pays and account.withdraw(10) == 0
    account.add(4.0, 0.5)
    assert account.withdraw(10) == 0
    account.add(3.5, 0.5)
    assert account.pays and account.withdraw(10) == 2 and account.balance == 0.5
    account.add(9.0, 0.0)
    assert account.withdraw(4) == 4 and account.withdraw(10) == 5


def test_what_checking_cost_speaks_against_trying_again_but_is_not_taken_from_progress():
    account = Account()
    account.add(2.0, 2.5)
    assert not account.pays and account.withdraw(10) == 2
    account.add(2.0, 1.0)
    assert account.pays and account.withdraw(10) == 2


def test_it_pays_while_the_last_attempts_bring_more_than_they_cost():
    account = Account()
    for brought in (2.0, -0.5, -0.5, -0.5):
        account.tried(brought)
        assert account.pays
    account.tried(-0.5)
    assert not account.pays and account.balance == 0
    again = Account()
    again.load_state_dict(json.loads(json.dumps(account.state_dict())))
    assert again.state_dict() == account.state_dict()
