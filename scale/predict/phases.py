"""Which phase a run is in, and when the next jump may be thought of:
Warmup -> Full -> (jump, or Stride) -> Correct -> Predict -> Full.

A jump happens between two steps and costs only forwards. Stride are full steps each of which is carried on at once. Correct
are the full steps after either, by which it is judged.
Predict are the steps it turned out to be worth: they are counted, and the schedule moves on, without a pass.
"""

from __future__ import annotations

from typing import Any, Literal

from scale.config.predict import PredictConfig

Phase = Literal["warmup", "full", "stride", "correct", "predict"]
LONGEST_WAIT = 64
"""Waiting after failures grows to this many times `min_full` at most."""


class Phases:
    """Counts steps; knows nothing of weights or losses. The same on every rank."""

    def __init__(self, config: PredictConfig, steps: int):
        self.config, self.steps = config, steps
        self.phase: Phase = "warmup"
        self.since = 0
        """Full steps since the last jump or the last thought of one."""
        self.wait = config.min_full
        self.left = 0
        """Steps left in Stride, Correct or Predict."""

    def made(self, step: int) -> None:
        """A full step was made."""
        self.since += 1
        if self.phase == "warmup" and step >= self.config.warmup:
            self.phase, self.since = "full", 0
        if self.phase in ("stride", "correct"):
            self.left -= 1
        if self.phase == "stride" and not self.left:
            self.jumped()

    def ripe(self, step: int) -> bool:
        """Whether a jump may be thought of before step `step` + 1. Near the end there is no room left to judge one."""
        room = step + self.config.strides + self.config.guard.relax + 1 < self.steps
        return self.config.mode != "observe" and self.phase == "full" and self.since >= self.wait and room

    def striding(self) -> None:
        """From here on full steps are carried on."""
        self.phase, self.left = "stride", self.config.strides

    def jumped(self) -> None:
        """A jump was taken: now full steps that show what it was worth."""
        self.phase, self.left, self.since = "correct", self.config.guard.relax, 0

    def rest(self) -> None:
        """Leave what a jump began, and go on with full steps."""
        if self.phase in ("stride", "correct", "predict"):
            self.phase, self.left = "full", 0

    def to_judge(self) -> bool:
        """Whether the relaxing steps are over."""
        return self.phase == "correct" and self.left == 0

    def judged(self, credit: int, paid: bool) -> None:
        """What the jump was worth, in steps."""
        self.phase, self.left = ("predict", credit) if credit else ("full", 0)
        self.waited(paid)

    def credited(self, steps: int) -> None:
        """More steps turned out to have been saved; when they are counted, what was ripe is still ripe."""
        self.phase, self.left = "predict", steps

    def waited(self, paid: bool) -> None:
        """Wait as briefly as allowed after something that paid, twice as long as before after something that did not."""
        self.wait = self.config.min_full if paid else min(2 * self.wait, LONGEST_WAIT * self.config.min_full)
        self.since = 0

    def predicted(self) -> None:
        """One of the steps that the jump was worth is counted."""
        self.left -= 1
        if self.left == 0:
            self.phase = "full"

    def room(self, step: int) -> int:
        """Most steps that may be counted as predicted after `step`: the last one of a run is real."""
        return max(0, self.steps - step - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self.phase, "since": self.since, "wait": self.wait, "left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phase, self.since, self.wait, self.left = (state[key] for key in ("phase", "since", "wait", "left"))
