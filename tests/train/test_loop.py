import pytest

from scale.protocols import Score
from scale.train.loop import Loop, LoopSettings
from scale.train.stop import StopSignal
from tests.train.parts import Numbers, stepper


class Notes:
    def __init__(self):
        self.rows, self.events, self.before = [], [], None

    def step(self, report, score):
        self.rows.append((report.step, score.loss if score else None))

    def score_before_training(self, score):
        self.before = score.loss

    def event(self, kind, text):
        self.events.append(kind)


class Scores:
    """A judge that gives these losses one after the other."""

    def __init__(self, losses):
        self.losses = iter(losses)

    def score(self):
        return Score(next(self.losses), tokens=10)


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


def test_state_round_trip():
    made, _, _ = loop(losses=[9, 5, 4, 3])
    made.run(StopSignal())
    other, _, _ = loop()
    other.load_state_dict(made.state_dict())
    assert (other.done, other.best, other.evaluations_without_gain) == (10, 3, 0)


def test_a_failed_save_ends_the_run():
    made, notes, _ = loop()

    def fail():
        raise OSError("disk full")

    made.check_saves = fail
    with pytest.raises(OSError, match="disk full"):
        made.run(StopSignal())
    assert len(notes.rows) == 1
