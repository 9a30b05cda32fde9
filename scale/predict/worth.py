"""What a jump was worth, in full steps: judged after a few relaxing steps, against what full steps bring themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def cost_of_forward(check_tokens: int, step_tokens: int, share: float = 1 / 3) -> float:
    """A checking forward in full steps. `share`: forward against forward and backward on the same tokens; 2 of the 6 FLOPs
    per weight and token."""
    return share * check_tokens / max(1, step_tokens)


LEAST = 0.2
"""A rate after a jump below this share of the one before it is taken for noise."""


def settled(worth: float, relaxed: int, before: float, after: float | None) -> float:
    """A worth corrected for full steps becoming slower on the way: `before` and `after` are their rates at both ends.

    Loss that falls as an exponential falls at a rate proportional to what is left, so its mean over a fall is the
    logarithmic mean of the rates at its ends. Never less than `worth`.
    """
    if after is None or after >= before or worth <= -relaxed:
        return worth
    low = max(after, LEAST * before)
    mean = (before - low) / math.log(before / low)
    return (worth + relaxed) * before / mean - relaxed


class Account:
    """Steps that jumps were worth and that are not credited yet. Both signs count: the noise of single verdicts evens out,
    and steps of progress that an undone jump cost are made good before anything is credited again."""

    RECENT = 4

    def __init__(self) -> None:
        self.balance = 0.0
        self.recent: list[float] = []
        """What the last attempts brought, costs of rejected ones included."""

    def add(self, progress: float, cost: float) -> None:
        """A verdict: full steps of progress, and what checking it cost."""
        self.balance += progress
        self.tried(progress - cost)

    def tried(self, brought: float) -> None:
        self.recent = [*self.recent, brought][-self.RECENT :]

    def withdraw(self, most: int) -> int:
        """Whole steps to be credited now."""
        steps = max(0, min(most, int(self.balance)))
        self.balance -= steps
        return steps

    @property
    def pays(self) -> bool:
        """Whether the last attempts together brought more than they cost."""
        return sum(self.recent) > 0

    def state_dict(self) -> dict[str, Any]:
        return {"balance": self.balance, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.balance, self.recent = state["balance"], list(state["recent"])


class Rate:
    """How fast full steps lower the check loss.

    A slope through the last few check losses, plus one standard error: noise must not make full steps look slow and
    jumps good. Two points alone have no error; the first jumps are judged by what they show.
    """

    LONGEST = 4

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        """(full steps made, check loss less what jumps took from it)."""

    def note(self, full_steps: int, loss: float) -> None:
        """A check loss between full steps. One at the same count replaces the last."""
        if math.isfinite(loss):
            kept = [point for point in self.points if point[0] != full_steps]
            self.points = [*kept, (full_steps, loss)][-self.LONGEST :]

    def jumped(self, full_steps: int, before: float, after: float, relaxed: int) -> None:
        """A jump and `relaxed` full steps led from `before` to `after`. What full steps do not explain is the jump's, and is
        taken from all earlier points, so that slopes remain those of full steps."""
        gained = before - after - relaxed * max(0.0, self.value() or 0.0)
        self.points = [(step, loss - gained) for step, loss in self.points]
        self.note(full_steps, after)

    def undone(self, relaxed: int) -> None:
        """`relaxed` full steps were made and taken back: they are no time in which the loss could have fallen."""
        self.points = [(step + relaxed, loss) for step, loss in self.points]

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

    def worth(self, before: float, after: float, relaxed: int) -> float:
        """Full steps that a jump saved: the fall of the check loss since just before it, in steps at the present rate, less
        the `relaxed` steps made. 0 where full steps do not lower the loss: then there is nothing to measure it by."""
        rate = self.value()
        if not math.isfinite(after):
            return -math.inf
        if rate is None or rate <= 0:
            return 0.0
        return (before - after) / rate - relaxed

    def latest(self) -> float | None:
        """Fall per full step in the last interval alone."""
        if len(self.points) < 2:
            return None
        (before, previous), (last, lowest) = self.points[-2:]
        return (previous - lowest) / (last - before)

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
