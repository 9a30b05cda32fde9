"""What a verdict brings to the account of steps, and what is settled later: by hand."""

from __future__ import annotations

import math

import pytest

from scale.parallel.ranks import Ranks
from scale.predict.attempt import MOST
from tests.predict.jump_ranks import Run

BEFORE, RATE, RELAX = 4.0, 0.1, 2


def judged(after, **guard):
    """A run whose full steps lower the check loss by 0.1 each, just after a jump from 4.0 was found at `after`."""
    guard = {"correction_interval": 3, "relax": RELAX, "credit": 1.0} | guard
    run = Run(Ranks(), "single", mode="auto", guard=guard)
    run.until("correct")
    attempts = run.attempts
    attempts.open.before = BEFORE
    attempts.rate.points = [(0, 5.0), (10, BEFORE)]
    run.heights = [after]
    (report,) = run.train(run.stepper.phases.left)[-1:]
    run.heights = None
    forwards = attempts.cost(run_forwards(run) + 2)
    return run, report.prediction, forwards


def run_forwards(run):
    """Checks while the jump was made."""
    return len(run.climbs[-1]["parts"]) + (run.climbs[-1]["rejected"] > 0)


def test_worth_is_credited_in_whole_steps_and_the_rest_is_kept():
    run, said, cost = judged(after=3.43)  # 5.7 steps' fall, 2 of them made
    assert said["worth"] == pytest.approx(3.7) and said["credit"] == 3
    assert run.attempts.account.balance == pytest.approx(0.7)
    assert run.attempts.account.recent == pytest.approx([3.7 - cost]) and cost > 0


def test_a_share_of_a_gain_is_credited_and_all_of_a_loss():
    run, said, _ = judged(after=3.43, credit=0.5)
    assert said["credit"] == 1 and run.attempts.account.balance == pytest.approx(0.5 * 3.7 - 1)
    run, said, _ = judged(after=3.95, credit=0.5)  # half a step's fall in two
    assert said["credit"] == 0 and run.attempts.account.balance == pytest.approx(0.5 - RELAX)


def test_an_undone_jump_costs_its_relaxing_steps_and_leaves_the_rate_as_it_is():
    run, said, cost = judged(after=4.5)
    account, rate = run.attempts.account, run.attempts.rate
    assert said["undone"] and account.balance == -RELAX and account.recent == pytest.approx([-RELAX - cost])
    assert rate.points == [(RELAX, 5.0), (10 + RELAX, BEFORE)] and rate.value() == pytest.approx(RATE)


def test_what_a_jump_gained_is_no_speed_of_full_steps():
    run, _, _ = judged(after=3.43)
    made = run.attempts.made
    gained = BEFORE - 3.43 - RELAX * RATE
    assert run.attempts.rate.points[:2] == [(0, pytest.approx(5.0 - gained)), (10, pytest.approx(BEFORE - gained))]
    assert run.attempts.rate.points[2] == (made, 3.43)


@pytest.mark.parametrize(("later", "share"), [(0.05, 1.0), (0.05, 0.6), (0.2, 1.0)])
def test_settling_adds_what_slower_steps_after_the_jump_make_it_worth(later, share):
    """Full steps were at 0.1 before the jump and are at `later` after it: their logarithmic mean counts."""
    run, _, _ = judged(after=3.43, credit=share)
    attempts = run.attempts
    most, worth, rate, _ = attempts.unsettled
    assert (most, worth, rate) == (MOST * run.climbs[-1]["kept"], pytest.approx(3.7), pytest.approx(RATE))
    attempts.account.balance = 0.0
    attempts.rate.points = [(20, 3.0), (30, 3.0 - 10 * later)]
    attempts.base = (attempts.made, 3.0 - 10 * later)
    attempts.rate.note = lambda *point: None
    mean = RATE if later >= RATE else (RATE - later) / math.log(RATE / later)
    extra = share * min((BEFORE - 3.43) / mean - RELAX, most) - share * 3.7
    credit = attempts.settle(run.source, room=100)
    assert credit == int(extra) and attempts.account.balance == pytest.approx(extra - int(extra))
    assert attempts.settle(run.source, room=100) == 0, "once"


def test_foreseen_losses_belong_to_the_steps_that_are_counted():
    """Counted steps come after the relaxing ones; nothing is foreseen beyond the horizon."""
    run = Run(Ranks(), "single", mode="auto", guard={"correction_interval": 3, "relax": RELAX, "credit": 1.0})
    run.until("correct")
    open_ = run.attempts.open
    object.__setattr__(open_.decision, "loss_K", [10.0, 11.0, 12.0, 13.0])
    open_.before, run.attempts.rate.points, run.heights = BEFORE, [(0, 5.0), (10, BEFORE)], [3.43]
    run.train(run.stepper.phases.left)
    run.heights = None
    reports = run.train(3)
    assert [r.kind for r in reports] == ["predict"] * 3
    assert [r.prediction.get("predicted_loss") for r in reports] == [12.0, 13.0, None]
