import math

import pytest
import torch

from scale.errors import UsageError
from scale.protocols import Score
from scale.train.loop import Loop, LoopSettings
from scale.train.stop import StopSignal
from tests.train.parts import Numbers, stepper


class Notes:
    def __init__(self):
        self.rows, self.events, self.texts, self.before = [], [], [], None

    def step(self, report, score):
        self.rows.append((report.step, score.loss if score else None))

    def score_before_training(self, score):
        self.before = score.loss

    def event(self, kind, text):
        self.events.append(kind)
        self.texts.append(text)


class Scores:
    """A judge that gives these losses one after the other."""

    def __init__(self, losses):
        self.losses = iter(losses)

    def score(self):
        loss = next(self.losses)
        return Score(loss, tokens=10) if loss is not None else Score(math.nan, tokens=0)


def loop(steps=10, eval_every=4, save_every=3, losses=None, patience=None, min_delta=0.0):
    notes, saves = Notes(), []
    settings = LoopSettings(steps, eval_every, save_every, patience, min_delta)
    judge = Scores(losses) if losses else None
    made = Loop(stepper(), Numbers(), settings, notes, lambda s, v: saves.append((s, v)), lambda: None, judge)
    return made, notes, saves


def test_scores_before_at_intervals_and_at_the_end():
    made, notes, saves = loop(losses=[9.0, 5.0, 4.0, 3.0])
    assert made.run(StopSignal()) == "completed"
    assert notes.before == 9.0
    assert [(s, v) for s, v in notes.rows if v is not None] == [(4, 5.0), (8, 4.0), (10, 3.0)]
    assert saves == [(3, None), (6, None), (9, None), (10, 3.0)]


def test_a_stop_request_saves_at_the_next_boundary_and_the_rest_can_be_done_later():
    made, notes, saves = loop()
    stop = StopSignal()
    made.check_saves = lambda: setattr(stop, "reason", "SIGTERM") if made.done == 5 else None
    assert made.run(stop) == "stopped"
    assert saves[-1] == (5, None) and notes.events == ["stop"] and made.done == 5
    assert made.run(StopSignal()) == "completed" and len(notes.rows) == 10


def test_early_stop_counts_evaluations_without_gain():
    made, notes, saves = loop(steps=40, losses=[9, 5, 4, 4.2, 3.99, 4.1, 3.0], patience=3, min_delta=0.05)
    assert made.run(StopSignal()) == "early stop"
    assert made.done == 20 and saves[-1] == (20, 4.1) and "early_stop" in notes.events
    assert made.run(StopSignal()) == "early stop" and made.done == 20  # the same command again does not go on


@pytest.mark.parametrize(
    ("losses", "stops_at"),
    [
        ([3.0 - 0.03 * i for i in range(20)], None),  # falls by .09 over any three: each second one is a gain
        ([3.0, 2.97, 2.94, 2.95, 2.96, 2.94], 6),  # .06 below the first at the third, then none
        ([3.0, 2.96, 2.97, 2.96, 2.8], 4),  # a little below the first is none
        ([3.0, 3.0, 2.75, 2.75, 2.75, 2.75], 6),  # equal is none
        ([3.0, None, None, math.nan, 2.0], 4),  # neither is no loss at all
    ],
)
@pytest.mark.parametrize("resume_after", [0, 1, 3])
def test_gains_are_measured_from_the_last_gain_of_min_delta_also_across_a_resume(losses, stops_at, resume_after):
    steps = len(losses)
    made, _, _ = loop(steps=steps, eval_every=1, losses=[9.0, *losses], patience=3, min_delta=0.05)
    if resume_after:
        stop = StopSignal()
        made.check_saves = lambda: setattr(stop, "reason", "SIGTERM") if made.done == resume_after else None
        assert made.run(stop) == "stopped"
        rest = loop(steps=steps, eval_every=1, losses=losses[resume_after:], patience=3, min_delta=0.05)[0]
        rest.load_state_dict(made.state_dict())
        rest.stepper.load_state_dict(made.stepper.state_dict())
        made = rest
    outcome = made.run(StopSignal())
    assert (outcome, made.done) == (("early stop", stops_at) if stops_at else ("completed", steps))
    seen = [loss for loss in losses[: made.done] if loss is not None and math.isfinite(loss)]
    assert made.best == min(seen), "the best is the lowest, however little below"


def test_a_checkpoint_without_a_reference_of_its_own_goes_on_from_the_best():
    made, _, _ = loop(losses=[9, 5, 4, 3])
    made.load_state_dict({"done": 4, "best": 5.0, "evaluations_without_gain": 1})
    assert (made.best, made.reference, made.evaluations_without_gain) == (5.0, 5.0, 1)


def test_a_held_out_loss_of_nothing_is_never_the_best_and_is_said():
    made, notes, saves = loop(losses=[None, 5.0, None, math.inf])
    assert made.run(StopSignal()) == "completed"
    assert made.best == made.reference == 5.0 and made.state_dict()["best"] == 5.0
    assert notes.events == ["evaluation"] * 3 and notes.texts[0] == "step 0: no held-out loss: not one token was scored"
    assert "not finite" in notes.texts[2] and math.isinf(saves[-1][1])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"steps": 0}, "steps = 0: expected 1 step or more"),
        ({"eval_every": 0}, "eval_every = 0: expected 1 step or more"),
        ({"save_every": -3}, "save_every = -3: expected 1 step or more"),
        ({"losses": [1.0], "patience": 0}, "patience = 0: expected 1 evaluation or more"),
        ({"losses": [1.0], "patience": 2, "min_delta": -0.1}, "min_delta = -0.1: expected"),
        ({"losses": [1.0], "patience": 2, "min_delta": math.nan}, "min_delta = nan: expected"),
        ({"losses": [1.0], "min_delta": 0.1}, "min_delta = 0.1: read with patience only"),
        ({"patience": 2}, "early_stop.patience = 2: nothing is held out"),
        ({"losses": [1.0], "patience": 3}, "early_stop.patience = 3: 10 steps, evaluated every 4, have 3 evaluation"),
        ({"losses": [1.0], "patience": 1, "eval_every": 50}, "early_stop.patience = 1: 10 steps, evaluated every 50"),
    ],
)
def test_what_could_not_be_honoured_is_refused(settings, line):
    with pytest.raises(UsageError) as told:
        loop(**settings)
    assert line in str(told.value)


def test_an_interval_longer_than_the_run_means_its_end():
    made, notes, saves = loop(steps=3, eval_every=50, save_every=70, losses=[9.0, 8.0])
    assert made.run(StopSignal()) == "completed"
    assert notes.rows[-1] == (3, 8.0) and saves == [(3, 8.0)]


def test_a_run_that_made_more_steps_than_are_asked_for_says_so():
    made, _, _ = loop(steps=5)
    made.load_state_dict({"done": 9, "best": None, "evaluations_without_gain": 0})
    with pytest.raises(UsageError, match="steps = 5: the run has made 9 already"):
        made.run(StopSignal())


def test_new_weights_are_published_after_every_step_and_before_the_first_of_a_resumed_run():
    class Listens(Numbers):
        def __init__(self):
            super().__init__(damage={1: lambda b: {"x": b["x"] * math.nan, "y": b["y"]}})
            self.heard, self.order = [], []

        def draw(self):
            self.order.append("draw")
            return super().draw()

        def publish(self, version, params):
            self.order.append(version)
            self.heard.append({n: p.detach().clone() for n, p in params()})

        def observe(self, report):
            self.order.append(report.kind)

    made, _, _ = loop(steps=3)
    made.source, made.params = Listens(), made.stepper.strategy.full_params
    made.run(StopSignal())
    assert made.source.order == ["draw", 1, "full", "draw", 2, "skipped", "draw", 3, "full"]
    assert all(torch.equal(p, made.source.heard[-1][n]) for n, p in made.stepper.root.model.named_parameters())
    rest, _, _ = loop(steps=4)
    rest.source = Listens()
    rest.load_state_dict(made.state_dict())
    rest.stepper.load_state_dict(made.stepper.state_dict())
    rest.run(StopSignal())
    assert rest.source.order[:3] == [3, "draw", 4]


def test_state_round_trip():
    made, _, _ = loop(losses=[9, 5, 4, 3])
    made.run(StopSignal())
    other, _, _ = loop()
    other.load_state_dict(made.state_dict())
    assert (other.done, other.best, other.reference, other.evaluations_without_gain) == (10, 3, 3, 0)


def test_a_failed_save_ends_the_run():
    made, notes, _ = loop()

    def fail():
        raise OSError("disk full")

    made.check_saves = fail
    with pytest.raises(OSError, match="disk full"):
        made.run(StopSignal())
    assert len(notes.rows) == 1
