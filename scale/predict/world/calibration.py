"""Forecasts against what came: coverage, error, and how much wider intervals have to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MISSED = 0.1
"""Share of losses that may lie outside of the interval."""
STEP = 0.01
"""How fast the level follows misses (gamma of Gibbs and Candes, arXiv 2106.00170)."""
KEPT = 200
"""Scored forecasts that count."""
PRIOR = (2.0, 20)
"""Widening before anything was scored, and how many scores it is worth."""
RANGE = (0.25, 8.0)
POINTS = (0.25, 0.5, 1.0)
"""Where along its horizon a forecast is scored."""
SINGLE = 2 * 1.645
"""Width of the 90% interval of single losses, in units of noise."""


@dataclass(frozen=True)
class Pending:
    """A forecast of one future average, before widening. `jump`: it holds only if a jump comes first."""

    made: int
    due: int
    jump: bool
    mean: float
    below: float
    above: float
    widening: float
    last: float


@dataclass(frozen=True)
class Scored:
    """What came of it: distance in half-widths before widening, inside the widened interval or not, both errors."""

    distance: float
    inside: bool
    error: float
    last_error: float


class Calibration:
    """Adaptive conformal intervals: the widening is the quantile of past distances at a level that follows misses."""

    def __init__(self) -> None:
        self.pending: list[Pending] = []
        self.scores: list[Scored] = []
        self.level = MISSED
        self.scored = 0

    @property
    def widening(self) -> float:
        """What half-widths are multiplied by; the prior alone at first."""
        value, weight = PRIOR
        if not self.scores:
            return value
        ordered = sorted(score.distance for score in self.scores)
        rank = min(math.ceil((len(ordered) + 1) * (1 - self.level)), len(ordered))
        trust = min(1.0, len(ordered) / weight)
        low, high = RANGE
        return min(max(trust * ordered[rank - 1] + (1 - trust) * value, low), high)

    def register(
        self,
        made: int,
        jump: bool,
        last: float,
        loss_T: Sequence[float],
        lower_T: Sequence[float],
        upper_T: Sequence[float],
    ) -> None:
        """A forecast made after `made` moments; the same one asked for twice counts once."""
        self.pending = [p for p in self.pending if (p.made, p.jump) != (made, jump)]
        for t in sorted({max(1, round(share * len(loss_T))) - 1 for share in POINTS}):
            mean = loss_T[t]
            below, above = max(mean - lower_T[t], 1e-12), max(upper_T[t] - mean, 1e-12)
            self.pending.append(Pending(made, made + t + 1, jump, mean, below, above, self.widening, last))

    def observe(self, moment: int, loss: float, jumped: bool) -> None:
        """The average loss after moment number `moment`, and whether a jump came right before that moment.

        A jump voids older forecasts, and its absence those that counted on it.
        """
        self.pending = [
            p for p in self.pending if (p.jump == jumped if p.made == moment - 1 else not jumped) and p.due >= moment
        ]
        for p in [p for p in self.pending if p.due == moment]:
            self._score(p, loss)
        self.pending = [p for p in self.pending if p.due > moment]

    def _score(self, p: Pending, loss: float) -> None:
        if not math.isfinite(loss):
            return
        distance = (loss - p.mean) / (p.above if loss > p.mean else p.below)
        inside = abs(distance) <= p.widening
        self.level = min(max(self.level + STEP * (MISSED - (not inside)), 0.01), 0.5)
        self.scores = [*self.scores, Scored(abs(distance), inside, abs(loss - p.mean), abs(loss - p.last))][-KEPT:]
        self.scored += 1

    def report(self) -> dict[str, float | None]:
        """Coverage of the 90% interval, mean error, the same of 'as it is now' (None while nothing was scored), widening,
        scores."""

        def mean(values: Sequence[float]) -> float | None:
            return sum(values) / len(values) if values else None

        return {
            "coverage": mean([s.inside for s in self.scores]),
            "error": mean([s.error for s in self.scores]),
            "last_value_error": mean([s.last_error for s in self.scores]),
            "widening": self.widening,
            "scored": float(self.scored),
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "pending": [asdict(p) for p in self.pending],
            "scores": [asdict(s) for s in self.scores],
            "level": self.level,
            "scored": self.scored,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.pending = [Pending(**p) for p in state["pending"]]
        self.scores = [Scored(**s) for s in state["scores"]]
        self.level, self.scored = state["level"], state["scored"]


def confidence(width: float, noise: float, divergence: float) -> float:
    """0 to 1, for an interval of `width`: 1 / (1 + (r / 2)^2), r its width relative to that of single losses.

    0.8 where the average at the horizon is as uncertain as a single loss is today, times the chance of no divergence.
    """
    relative = width / (SINGLE * noise)
    return (1 - divergence) / (1 + (relative / 2) ** 2)
