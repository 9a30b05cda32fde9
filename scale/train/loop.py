"""The loop of every stage. It knows neither the paradigm nor where weights live: it steps, scores, records, saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from scale.errors import ScaleError, UsageError
from scale.protocols import Judge, Score, Source, Stepper, StepReport
from scale.train.profile import StepProfiler
from scale.train.stop import StopSignal

Outcome = Literal["completed", "stopped", "early stop"]


class Recorder(Protocol):
    """Writes down what happened."""

    def step(self, report: StepReport, score: Score | None) -> None: ...

    def score_before_training(self, score: Score) -> None: ...

    def event(self, kind: str, text: str) -> None: ...


@dataclass(frozen=True)
class LoopSettings:
    """Lengths and intervals in steps. `patience` evaluations in a row whose loss is not `min_delta` below the last that was
    stop the run (None: never). Raises UsageError for what could not be honoured."""

    steps: int
    eval_every: int
    save_every: int
    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("eval_every", self.eval_every), ("save_every", self.save_every)):
            if value < 1:
                raise UsageError(f"{name} = {value}: expected 1 step or more")
        if self.patience is None and self.min_delta:
            raise UsageError(f"min_delta = {self.min_delta:g}: read with patience only (give patience as well)")
        if self.patience is not None and self.patience < 1:
            raise UsageError(f"patience = {self.patience}: expected 1 evaluation or more (None: never stop early)")
        if not (math.isfinite(self.min_delta) and self.min_delta >= 0):
            raise UsageError(f"min_delta = {self.min_delta:g}: expected a number of 0 or more")
        if self.patience is not None and self.patience >= self.evaluations:
            raise UsageError(
                f"early_stop.patience = {self.patience}: {self.steps} steps, evaluated every {self.eval_every}, have "
                f"{self.evaluations} evaluation(s) after the start: it could never stop (evaluate more often, or leave it out)"
            )

    @property
    def evaluations(self) -> int:
        """In a run of full length, the one before step 1 left out."""
        return -(-self.steps // self.eval_every)


class Loop:
    """`save(step, val_loss)` starts a checkpoint of everything; it may return before that is on disk. `check_saves` raises
    as soon as one is known to have failed. `first_step_done` is called once: compiling and warming up are over. `params`
    reads the whole weights, one parameter at a time: for the source, after each step.

    Raises UsageError for `patience` without a judge."""

    def __init__(
        self,
        stepper: Stepper,
        source: Source,
        settings: LoopSettings,
        record: Recorder,
        save: Callable[[int, float | None], None],
        check_saves: Callable[[], None],
        judge: Judge | None = None,
        profiler: StepProfiler | None = None,
        first_step_done: Callable[[], None] = lambda: None,
        params: Callable[[], Iterable[tuple[str, Tensor]]] = tuple,
    ):
        if settings.patience is not None and judge is None:
            raise UsageError(
                f"early_stop.patience = {settings.patience}: nothing is held out, so no loss could stop the run"
            )
        self.stepper, self.source, self.settings, self.record, self.save = stepper, source, settings, record, save
        self.check_saves = check_saves
        self.judge, self.profiler, self.first_step_done, self.params = judge, profiler, first_step_done, params
        self.done = 0
        self.best = math.inf
        self.reference = math.inf
        """The loss that a gain is measured from: the last one that was `min_delta` below the one before it."""
        self.evaluations_without_gain = 0

    def run(self, stop: StopSignal) -> Outcome:
        """Train to the end, to a stop request or to an early stop; a checkpoint is started in each case, except that a
        stop before the first step leaves all as it was. A profile that the end cuts off is written, whatever ended the run."""
        try:
            outcome = self._run(stop)
        except BaseException:
            with suppress(ScaleError):  # the first error is the one to show
                self._end_profile()
            raise
        self._end_profile()
        return outcome

    def _run(self, stop: StopSignal) -> Outcome:
        if self.done > self.settings.steps:
            raise UsageError(
                f"steps = {self.settings.steps}: the run has made {self.done} already (give it more, or another name)"
            )
        if self.done == 0 and self.judge is not None:
            before = self.judge.score()
            self.record.score_before_training(before)
            self._say_undefined(before)
        if self._patience_spent():
            return "early stop"
        if self.done < self.settings.steps and self.stopped(stop):
            return "stopped"
        if 0 < self.done < self.settings.steps:  # the source was made anew, and its weights are those of step 0
            self.source.publish(self.done, self.params)
        first = True
        while self.done < self.settings.steps:
            score = self._one_step()
            if first:
                self.first_step_done()
                first = False
            self.check_saves()
            self._note(score)
            gave_up = self._patience_spent()
            reason = stop.asked()
            last = self.done == self.settings.steps or gave_up or reason is not None
            if last or self.done % self.settings.save_every == 0:
                self.save(self.done, score.loss if score else None)
            if reason is not None and self.done < self.settings.steps:
                self.record.event("stop", f"{reason}: stopping after step {self.done}")
                return "stopped"
            if gave_up:
                self.record.event(
                    "early_stop", f"no gain in {self.evaluations_without_gain} evaluations: stopping early"
                )
                return "early stop"
        return "completed"

    def stopped(self, stop: StopSignal) -> bool:
        """Whether a stop was asked for, which is then noted. Collective."""
        reason = stop.asked()
        if reason is not None:
            self.record.event("stop", f"{reason}: stopping after step {self.done}")
        return reason is not None

    def _one_step(self) -> Score | None:
        if self.profiler is not None:
            self.profiler.before(self.done + 1)
        report = self.stepper.step(self.source)
        self.done = report.step
        self.source.publish(report.step, self.params)
        self.source.observe(report)
        if self.profiler is not None:
            self._tell_of(self.profiler.after(report.step))
        due = report.step % self.settings.eval_every == 0 or report.step == self.settings.steps
        score = self.judge.score() if due and self.judge is not None else None
        self.record.step(report, score)
        return score

    def _end_profile(self) -> None:
        if self.profiler is not None:
            self._tell_of(self.profiler.finish())

    def _tell_of(self, trace: Path | None) -> None:
        if trace is not None:
            self.record.event("profile", f"profile written to {trace}")

    def _note(self, score: Score | None) -> None:
        """Remember the best loss, and count evaluations without a gain. A loss that is undefined is neither."""
        if score is None:
            return
        self._say_undefined(score)
        loss = score.loss if math.isfinite(score.loss) else math.inf
        self.best = min(self.best, loss)
        if loss < self.reference and loss <= self.reference - self.settings.min_delta:
            self.reference, self.evaluations_without_gain = loss, 0
        else:
            self.evaluations_without_gain += 1

    def _say_undefined(self, score: Score) -> None:
        if not math.isfinite(score.loss):
            why = "it is not finite, or a part of it has no tokens" if score.tokens else "not one token was scored"
            self.record.event("evaluation", f"step {self.done}: no held-out loss: {why}")

    def _patience_spent(self) -> bool:
        return self.settings.patience is not None and self.evaluations_without_gain >= self.settings.patience

    def state_dict(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "best": _finite(self.best),
            "reference": _finite(self.reference),
            "evaluations_without_gain": self.evaluations_without_gain,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checkpoints of earlier versions have no reference of their own: it was the best loss."""
        self.done, self.evaluations_without_gain = state["done"], state["evaluations_without_gain"]
        self.best, self.reference = (
            math.inf if loss is None else loss for loss in (state["best"], state.get("reference", state["best"]))
        )


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
