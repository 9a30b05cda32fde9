"""Acceptance tests of jumps whose check losses are planted: undone, credited, never with more than they may be."""

from __future__ import annotations

import json
import math

import pytest

from scale.parallel.ranks import Ranks
from tests.predict.jump_ranks import BASE, STEPS, Run


def settled(mode, after, **settings):
    """A run just after a jump was judged by this check loss; the step's report and what it kept."""
    run = Run(Ranks(), "single", mode=mode, **settings)
    start = run.cycle.try_jump
    masters = []

    def started(*arguments):
        masters[:] = [run.bits()]
        return start(*arguments)

    run.cycle.try_jump = started
    run.until("settle")
    step = run.stepper.full.steps_done
    run.heights = [after]
    (report,) = run.train(run.stepper.cycle.left)[-1:]
    run.heights = None
    assert run.stepper.full.steps_done - step < 2 and "credited" in report.prediction
    return run, report.prediction, masters[0]


def test_a_miracle_is_credited_with_a_limited_number_of_steps():
    run, said, _ = settled("auto", after=0.01)
    kept = run.climbs[-1]["kept"]
    assert said["steps_saved"] > 100 and said["credited"] == min(2 * kept, STEPS - run.stepper.full.steps_done - 1)
    while run.stepper.full.steps_done < STEPS:
        (last,) = run.train(1)
    assert last.kind != "predict" and run.stepper.full.steps_done == STEPS


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("after", [math.nan, math.inf])
def test_a_jump_that_leads_to_no_finite_loss_is_undone_in_every_mode(mode, after):
    run, said, start = settled(mode, after)
    assert said["undone"] and said["credited"] == 0 and run.bits() == start
    while run.stepper.full.steps_done < STEPS:
        run.train(1)
    state = json.dumps(run.stepper.cycle.rate.state_dict())
    assert "NaN" not in state and "Infinity" not in state


def test_a_jump_that_left_the_loss_higher_is_undone_where_it_has_to_pay():
    run, said, start = settled("auto", after=50.0)
    assert said["undone"] and run.bits() == start and run.stepper.cycle.phase == "full"
    assert run.stepper.ledger.rejected >= run.climbs[-1]["kept"] and run.stepper.ledger.accepted == 0


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_jump_that_is_asked_for_always_counts_by_its_length(share):
    run, said, start = settled("always", 50.0, guard=BASE["guard"] | {"discount": share})
    assert not said["undone"] and said["credited"] == int(share * run.climbs[-1]["kept"]) and run.bits() != start
