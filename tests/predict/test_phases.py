"""When a jump may be tried, how long to wait after failures, and that a run ends where it must."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from scale.config.predict import PredictConfig
from scale.predict.cycle import LONGEST_WAIT, JumpCycle


class Machine(JumpCycle):
    """The state machine alone: no weights, and acceptance tests of which the outcome is planted."""

    def __init__(self, steps=100, warmup=5, min_full=3, settle=2, mode="always"):
        self.config = PredictConfig(mode=mode, warmup=warmup, min_full=min_full, guard={"settle_steps": settle})
        self.guard, self.losses = self.config.guard, []
        self.full = SimpleNamespace(steps_done=0, settings=SimpleNamespace(steps=steps))
        self.hook = SimpleNamespace(ready=lambda: ["optimizer"])
        self.phase, self.since, self.wait, self.left = "warmup", 0, min_full, 0

    def steps_made(self, count):
        for _ in range(count):
            self.full.steps_done += 1
            self.made(self.full.steps_done, applied=True)

    def tested(self, credit, pays):
        self.phase, self.left = ("predict", credit) if credit else ("full", 0)
        self.waited(pays)

    def counted(self):
        self.full.steps_done += 1
        self.predicted()


def ripe_before(machine, steps):
    """Whether a jump could be tried before each of the next steps."""
    found = []
    for _ in range(steps):
        found.append(machine.ripe())
        machine.steps_made(1)
    return found


def test_no_jump_in_warm_up_nor_before_min_full_steps():
    assert ripe_before(Machine(), 11) == [False] * 8 + [True] * 3, "5 steps of warm-up, then 3 full ones"


def test_observing_is_never_ripe():
    assert not any(ripe_before(Machine(mode="observe"), 98))


def test_waiting_doubles_after_failures_up_to_a_limit_and_is_short_again_after_success():
    machine, waits = Machine(steps=10_000), []
    machine.steps_made(8)
    for _ in range(9):
        assert machine.ripe()
        machine.waited(pays=False)
        waits.append(machine.wait)
        machine.steps_made(machine.wait - 1)
        assert not machine.ripe(), "one step too early"
        machine.steps_made(1)
    assert waits == [6, 12, 24, 48, 96, 192, 192, 192, 192] and LONGEST_WAIT == 64
    machine.waited(pays=True)
    assert machine.wait == 3


def test_a_jump_is_settled_tested_counted_and_followed_by_full_steps():
    machine = Machine()
    machine.steps_made(8)
    machine._settle_now()
    for _ in range(2):
        assert machine.phase == "settle" and not machine.ripe() and not machine.due()
        machine.steps_made(1)
    assert machine.due()
    machine.tested(credit=4, pays=True)
    story = []
    while machine.phase == "predict":
        story.append(machine.left)
        machine.counted()
    assert story == [4, 3, 2, 1] and machine.phase == "full" and not machine.due() and not machine.ripe()
    machine.steps_made(3)
    assert machine.ripe()


def test_no_jump_where_it_could_not_be_tested():
    ripe = ripe_before(Machine(steps=20, settle=4), 20)
    assert ripe == [9 <= step <= 15 for step in range(1, 21)], "4 settle steps and a real last one must follow"


@settings(max_examples=300, deadline=None)
@given(
    steps=st.integers(1, 120), warmup=st.integers(1, 20), min_full=st.integers(1, 6), settle=st.integers(1, 5),
    outcomes=st.lists(st.tuples(st.booleans(), st.integers(0, 50)), min_size=60),
)  # fmt: skip
def test_every_run_ends_at_its_last_step_with_a_real_one(steps, warmup, min_full, settle, outcomes):
    """Whatever comes of the jumps: a state machine driven as the stepper drives it."""
    machine, kinds, left = Machine(steps, warmup, min_full, settle), [], list(outcomes)
    while machine.full.steps_done < steps:
        if machine.phase == "predict":
            machine.counted()
            kinds.append("predict")
            continue
        if machine.ripe():
            assert machine.full.steps_done >= warmup + min_full
            if left[0][0]:
                machine._settle_now()
            else:
                machine.waited(pays=False)
                left = left[1:] + left[:1]
        machine.steps_made(1)
        kinds.append("full")
        if machine.due():
            credit = left[0][1]
            left = left[1:] + left[:1]
            machine.tested(min(credit, machine.room()), pays=credit > 0)
    assert machine.full.steps_done == steps == len(kinds) and kinds[-1] == "full"
    assert set(kinds[: warmup + min_full]) <= {"full"} and machine.phase != "settle"
