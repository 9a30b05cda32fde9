"""The loop of every stage. It knows neither the paradigm nor where weights live: it steps, scores, records, saves."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from scale.errors import ScaleError
from scale.protocols import Judge, Score, Source, Stepper, StepReport
from scale.train.profile import StepProfiler
from scale.train.stop import StopSignal

Outcome = Literal["completed", "stopped", "early stop"]


class Recorder(Protocol):
    """Writes down what happened."""

    def step(self, report: StepReport, score: Score | None) -> None: ...

    def score_before_training(self, score: Score) -> None: ...

    def event(self, kind: str, text: str) -> None: ...


@runtime_checkable
class Ending(Protocol):
    """A stepper that may have reached what the run was for before its last step."""

    def reached(self) -> str | None:
        """Why the run ends here, the same answer on every rank; None: it goes on. A resumed stepper answers as before."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """Lengths and intervals in steps. `patience` evaluations without `min_delta` less loss stop the run (None: never)."""

    steps: int
    eval_every: int
    save_every: int
    patience: int | None = None
    min_delta: float = 0.0


class Loop:
    """`save(step, val_loss)` starts a checkpoint of everything; it may return before that is on disk. `check_saves` raises
    as soon as one is known to have failed. `first_step_done` is called once: compiling and warming up are over."""

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
    ):
        self.stepper, self.source, self.settings, self.record, self.save = stepper, source, settings, record, save
        self.check_saves = check_saves
        self.judge, self.profiler, self.first_step_done = judge, profiler, first_step_done
        self.done = 0
        self.best = math.inf
        self.evaluations_without_gain = 0

    def run(self, stop: StopSignal) -> Outcome:
        """Train to the end, to a stop request or to an early stop; a checkpoint is started in each case. A profile that the
        end cuts off is written, whatever ended the run."""
        try:
            outcome = self._run(stop)
        except BaseException:
            with suppress(ScaleError):  # the first error is the one to show
                self._end_profile()
            raise
        self._end_profile()
        return outcome

    def _run(self, stop: StopSignal) -> Outcome:
        if self.done == 0 and self.judge is not None:
            self.record.score_before_training(self.judge.score())
        if self._patience_spent() or self._reached():
            return "early stop"
        first = True
        while self.done < self.settings.steps:
            score = self._one_step()
            if first:
                self.first_step_done()
                first = False
            self.check_saves()
            self._note(score)
            gave_up = self._patience_spent()
            enough = self._reached()
            reason = stop.asked()
            last = self.done == self.settings.steps or gave_up or enough or reason is not None
            if last or self.done % self.settings.save_every == 0:
                self.save(self.done, score.loss if score else None)
            if reason is not None and self.done < self.settings.steps:
                self.record.event("stop", f"{reason}: stopping after step {self.done}")
                return "stopped"
            if gave_up:
                self.record.event(
                    "early_stop", f"no gain in {self.evaluations_without_gain} evaluations: stopping early"
                )
            if gave_up or enough:
                return "early stop"
        return "completed"

    def _one_step(self) -> Score | None:
        if self.profiler is not None:
            self.profiler.before(self.done + 1)
        report = self.stepper.step(self.source)
        self.source.observe(report)
        self.done = report.step
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
        if score is not None:
            improved = score.loss < self.best - self.settings.min_delta
            self.best = min(self.best, score.loss)
            self.evaluations_without_gain = 0 if improved else self.evaluations_without_gain + 1

    def _patience_spent(self) -> bool:
        return self.settings.patience is not None and self.evaluations_without_gain >= self.settings.patience

    def _reached(self) -> bool:
        """Whether the stepper ends the run, which is said each time it is asked to go on."""
        if self.done >= self.settings.steps or not isinstance(self.stepper, Ending):
            return False
        why = self.stepper.reached()
        if why is not None:
            self.record.event("early_stop", f"{why}: the run ends after step {self.done}")
        return why is not None

    def state_dict(self) -> dict[str, Any]:
        best = None if math.isinf(self.best) else self.best
        return {"done": self.done, "best": best, "evaluations_without_gain": self.evaluations_without_gain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.evaluations_without_gain = state["done"], state["evaluations_without_gain"]
        self.best = math.inf if state["best"] is None else state["best"]
