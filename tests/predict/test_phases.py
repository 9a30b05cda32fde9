"""When a jump may be thought of, how long to wait after failures, and that a run ends where it must."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scale.config.predict import PredictConfig
from scale.predict.phases import LONGEST_WAIT, Phases


def made(steps=100, warmup=5, min_full=3, relax=2, mode="always"):
    return Phases(
        PredictConfig(mode=mode, warmup=warmup, min_full=min_full, guard={"relax": relax}), steps
    )  # fmt: skip


def test_no_jump_in_warm_up_nor_before_min_full_steps():
    phases = made()
    ripe = []
    for step in range(1, 12):
        ripe.append(phases.ripe(step - 1))
        phases.made(step)
    assert ripe == [False] * 8 + [True] * 3, "5 steps of warm-up, then 3 full ones"


def test_observing_is_never_ripe():
    phases = made(mode="observe")
    for step in range(1, 99):
        assert not phases.ripe(step - 1)
        phases.made(step)


def full(phases, step, count):
    for n in range(count):
        phases.made(step + n + 1)
    return step + count


def test_waiting_doubles_after_failures_up_to_a_limit_and_is_short_again_after_success():
    phases = made(steps=10_000)
    step, waits = full(phases, 0, 8), []
    for _ in range(9):
        assert phases.ripe(step)
        phases.waited(paid=False)
        waits.append(phases.wait)
        step = full(phases, step, phases.wait - 1)
        assert not phases.ripe(step), "one step too early"
        step = full(phases, step, 1)
    assert waits == [6, 12, 24, 48, 96, 192, 192, 192, 192] and LONGEST_WAIT == 64
    phases.waited(paid=True)
    assert phases.wait == 3


def test_a_jump_is_relaxed_judged_counted_and_followed_by_full_steps():
    phases = made()
    step = full(phases, 0, 8)
    phases.jumped()
    story = []
    for _ in range(2):
        assert phases.phase == "correct" and not phases.ripe(step) and not phases.to_judge()
        step = full(phases, step, 1)
    assert phases.to_judge()
    phases.judged(credit=4, paid=True)
    while phases.phase == "predict":
        story.append(phases.left)
        phases.predicted()
    assert story == [4, 3, 2, 1] and phases.phase == "full" and not phases.to_judge()
    assert not phases.ripe(step) and phases.ripe(full(phases, step, 3))


def test_a_jump_worth_nothing_leads_back_to_full_steps():
    phases = made()
    full(phases, 0, 8)
    phases.jumped()
    full(phases, 8, 2)
    phases.judged(credit=0, paid=False)
    assert (phases.phase, phases.wait, phases.since) == ("full", 6, 0)


def test_no_jump_where_it_could_not_be_judged():
    phases = made(steps=20, relax=4)
    for step in range(1, 21):
        ripe = phases.ripe(step - 1)
        assert ripe == (9 <= step <= 15), f"before step {step}: 4 relaxing ones and a real last one must follow"
        phases.made(step)


@settings(max_examples=300, deadline=None)
@given(
    steps=st.integers(1, 120), warmup=st.integers(1, 20), min_full=st.integers(1, 6), relax=st.integers(1, 5),
    outcomes=st.lists(st.tuples(st.sampled_from(["stay", "rejected", "kept"]), st.integers(0, 50)), min_size=60),
)  # fmt: skip
def test_every_run_ends_at_its_last_step_with_a_real_one(steps, warmup, min_full, relax, outcomes):
    """Whatever comes of the jumps: a state machine driven as the stepper drives it."""
    phases, step, kinds, left = made(steps, warmup, min_full, relax), 0, [], list(outcomes)
    while step < steps:
        if phases.phase == "predict":
            step += 1
            phases.predicted()
            kinds.append("predict")
            continue
        if phases.ripe(step):
            assert step >= warmup + min_full
            outcome, _ = left[0]
            if outcome == "kept":
                phases.jumped()
            else:
                phases.waited(paid=False)
                left = left[1:] + left[:1]
        copy = made(steps, warmup, min_full, relax)
        copy.load_state_dict(phases.state_dict())
        phases, step = copy, step + 1
        phases.made(step)
        kinds.append("full")
        if phases.to_judge():
            _, credit = left[0]
            left = left[1:] + left[:1]
            phases.judged(min(credit, phases.room(step)), paid=credit > 0)
    assert step == steps == len(kinds) and kinds[-1] == "full"
    assert set(kinds[: warmup + min_full]) <= {"full"} and phases.phase != "correct"
