"""How many full steps a jump saved: estimated after a few settle steps, against what full steps bring themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

FORWARD = 1 / 3
"""Cost of a forward pass beside forward and backward on the same tokens: 2 of the 6 FLOPs per weight and token."""
LEAST = 0.2
"""A rate after a jump below this share of the one before it is taken for noise."""


def corrected(saved: float, settle_steps: int, before: float, after: float | None) -> float:
    """Steps saved, corrected for full steps becoming slower on the way: `before` and `after` are their rates at both ends.

    Loss that falls as an exponential falls at a rate proportional to what is left, so its mean over a fall is the
    logarithmic mean of the rates at its ends. Never less than `saved`.
    """
    if after is None or after >= before or saved <= -settle_steps:
        return saved
    low = max(after, LEAST * before)
    mean = (before - low) / math.log(before / low)
    return (saved + settle_steps) * before / mean - settle_steps


class SavedSteps:
    """Steps that jumps saved and that are not counted yet. Both signs count: the noise of single tests evens out, and steps
    of progress that an undone jump cost are made good before anything is counted again."""

    RECENT = 4

    def __init__(self) -> None:
        self.balance = 0.0
        self.recent: list[float] = []
        """What the last trials brought, costs of rejected ones included."""

    def add(self, steps: float, cost: float) -> None:
        """Of one acceptance test, and what testing cost."""
        self.balance += steps
        self.tried(steps - cost)

    def tried(self, brought: float) -> None:
        self.recent = [*self.recent, brought][-self.RECENT :]

    def withdraw(self, most: int) -> int:
        """Whole steps to be counted now."""
        steps = max(0, min(most, int(self.balance)))
        self.balance -= steps
        return steps

    @property
    def pays(self) -> bool:
        """Whether the last trials together brought more than they cost."""
        return sum(self.recent) > 0

    def state_dict(self) -> dict[str, Any]:
        return {"balance": self.balance, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.balance, self.recent = state["balance"], list(state["recent"])


class LossRate:
    """How fast full steps lower the check loss.

    A slope through the last few check losses, plus one standard error: noise must not make full steps look slow and
    jumps good. Two points alone have no error; the first jumps are judged by what they show.
    """

    LONGEST = 4

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        """(full steps made, check loss less what jumps took from it)."""

    def add(self, full_steps: int, loss: float) -> None:
        """A check loss between full steps. One at the same count replaces the last."""
        if math.isfinite(loss):
            kept = [point for point in self.points if point[0] != full_steps]
            self.points = [*kept, (full_steps, loss)][-self.LONGEST :]

    def jumped(self, full_steps: int, before: float, after: float, settle_steps: int) -> None:
        """A jump and `settle_steps` full steps led from `before` to `after`. What full steps do not explain is the jump's, and
        is taken from all earlier points, so that slopes remain those of full steps."""
        gained = before - after - settle_steps * max(0.0, self.value() or 0.0)
        self.points = [(step, loss - gained) for step, loss in self.points]
        self.add(full_steps, after)

    def undone(self, settle_steps: int) -> None:
        """`settle_steps` were made and taken back: they are no time in which the loss could have fallen."""
        self.points = [(step + settle_steps, loss) for step, loss in self.points]

    def value(self) -> float | None:
        """Fall of the check loss per full step; None before there are two points."""
        if len(self.points) < 2:
            return None
        x, y = np.array(self.points, dtype=np.float64).T
        x -= x.mean()
        slope = float(x @ (y - y.mean()) / (x @ x))
        left = y - y.mean() - slope * x
        error = math.sqrt(float(left @ left) / max(1, len(x) - 2) / float(x @ x))
        return -slope + error

    def latest(self) -> float | None:
        """Fall per full step in the last interval alone."""
        if len(self.points) < 2:
            return None
        (before, previous), (last, lowest) = self.points[-2:]
        return (previous - lowest) / (last - before)

    def saved(self, before: float, after: float, settle_steps: int) -> float:
        """Full steps that a jump saved: the fall of the check loss since just before it, in steps at the present rate, less
        the `settle_steps` made. 0 where full steps do not lower the loss: then there is nothing to measure it by."""
        rate = self.value()
        if not math.isfinite(after):
            return -math.inf
        if rate is None or rate <= 0:
            return 0.0
        return (before - after) / rate - settle_steps

    def reward(self, before: float, after: float, cost: float) -> float:
        """Loss gained per unit of cost (in full steps) against full steps: 0 is as good, 1 twice as good; -2 to 5."""
        rate = self.value()
        if rate is None or rate <= 0 or cost <= 0 or not math.isfinite(after):
            return -1.0 if math.isfinite(after) else -2.0
        return min(5.0, max(-2.0, (before - after) / cost / rate - 1.0))

    def state_dict(self) -> dict[str, Any]:
        return {"points": [list(point) for point in self.points]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points = [(int(step), float(loss)) for step, loss in state["points"]]
