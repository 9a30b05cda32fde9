"""What an acceptance test adds to the steps saved, and what is added later: by hand."""

from __future__ import annotations

import math

import pytest

from scale.parallel.ranks import Ranks
from scale.predict.cycle import MOST
from tests.predict.jump_ranks import Run

BEFORE, RATE, SETTLE = 4.0, 0.1, 2


def judged(after, **guard):
    """A run whose full steps lower the check loss by 0.1 each, just after a jump from 4.0 was found at `after`."""
    guard = {"correction_interval": 3, "settle_steps": SETTLE, "discount": 1.0} | guard
    run = Run(Ranks(), "single", mode="auto", guard=guard)
    run.until("settle")
    cycle = run.cycle
    cycle.open.before = BEFORE
    cycle.rate.points = [(0, 5.0), (10, BEFORE)]
    run.heights = [after]
    (report,) = run.train(run.stepper.cycle.left)[-1:]
    run.heights = None
    forwards = cycle._cost(run_forwards(run) + 2)
    return run, report.prediction, forwards


def run_forwards(run):
    """Checks while the jump was made."""
    return len(run.climbs[-1]["parts"]) + (run.climbs[-1]["rejected"] > 0)


def test_saved_steps_are_credited_in_whole_steps_and_the_rest_is_kept():
    run, said, cost = judged(after=3.43)  # 5.7 steps' fall, 2 of them made
    assert said["steps_saved"] == pytest.approx(3.7) and said["credited"] == 3
    assert run.cycle.savings.balance == pytest.approx(0.7)
    assert run.cycle.savings.recent == pytest.approx([3.7 - cost]) and cost > 0


def test_a_share_of_a_gain_is_credited_and_all_of_a_loss():
    run, said, _ = judged(after=3.43, discount=0.5)
    assert said["credited"] == 1 and run.cycle.savings.balance == pytest.approx(0.5 * 3.7 - 1)
    run, said, _ = judged(after=3.95, discount=0.5)  # half a step's fall in two
    assert said["credited"] == 0 and run.cycle.savings.balance == pytest.approx(0.5 - SETTLE)


def test_an_undone_jump_costs_its_settle_steps_and_leaves_the_rate_as_it_is():
    run, said, cost = judged(after=4.5)
    savings, rate = run.cycle.savings, run.cycle.rate
    assert said["undone"] and savings.balance == -SETTLE and savings.recent == pytest.approx([-SETTLE - cost])
    assert rate.points == [(SETTLE, 5.0), (10 + SETTLE, BEFORE)] and rate.value() == pytest.approx(RATE)


def test_what_a_jump_gained_is_no_speed_of_full_steps():
    run, _, _ = judged(after=3.43)
    made = run.stepper.ledger.full
    gained = BEFORE - 3.43 - SETTLE * RATE
    assert run.cycle.rate.points[:2] == [(0, pytest.approx(5.0 - gained)), (10, pytest.approx(BEFORE - gained))]
    assert run.cycle.rate.points[2] == (made, 3.43)


@pytest.mark.parametrize(("later", "share"), [(0.05, 1.0), (0.05, 0.6), (0.2, 1.0)])
def test_slower_steps_after_the_jump_add_to_what_it_saved(later, share):
    """Full steps were at 0.1 before the jump and are at `later` after it: their logarithmic mean counts."""
    run, _, _ = judged(after=3.43, discount=share)
    cycle = run.cycle
    most, worth, rate, _ = cycle.unsettled
    assert (most, worth, rate) == (MOST * run.climbs[-1]["kept"], pytest.approx(3.7), pytest.approx(RATE))
    cycle.savings.balance = 0.0
    cycle.rate.points = [(20, 3.0), (30, 3.0 - 10 * later)]
    cycle.base = (run.stepper.ledger.full, 3.0 - 10 * later)
    cycle.rate.add = lambda *point: None
    mean = RATE if later >= RATE else (RATE - later) / math.log(RATE / later)
    extra = share * min((BEFORE - 3.43) / mean - SETTLE, most) - share * 3.7
    credit = cycle.settle(run.source)
    assert credit == int(extra) and cycle.savings.balance == pytest.approx(extra - int(extra))
    assert cycle.settle(run.source) == 0, "once"


def test_forecast_losses_belong_to_the_steps_that_are_counted():
    """Counted steps come after the settle steps; nothing is forecast beyond the horizon."""
    run = Run(Ranks(), "single", mode="auto", guard={"correction_interval": 3, "settle_steps": SETTLE, "discount": 1.0})
    run.until("settle")
    open_ = run.cycle.open
    object.__setattr__(open_.decision, "loss_K", [10.0, 11.0, 12.0, 13.0])
    open_.before, run.cycle.rate.points, run.heights = BEFORE, [(0, 5.0), (10, BEFORE)], [3.43]
    run.train(run.stepper.cycle.left)
    run.heights = None
    reports = run.train(3)
    assert [r.kind for r in reports] == ["predict"] * 3
    assert [r.prediction.get("predicted_loss") for r in reports] == [12.0, 13.0, None]
