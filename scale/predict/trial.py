"""One jump, or one row of extrapolated updates, from the check before it to the report of its acceptance test."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from scale.predict.controller import Decision


@dataclass
class Trial:
    """A jump that was decided for. Not `tried`: first the rate of full steps has to be known."""

    decision: Decision
    before: float
    tried: bool = True
    after: float = math.nan
    """Check loss right after the jump, before the settle steps."""
    kept: int = 0
    """Steps of the jump that were kept, or by which updates were extrapolated in all."""
    forwards: int = 0
    """Beside those before the jump and after the settle steps."""
    begun: int = 0
    """Full steps that were made before it."""
    extrapolating: bool = False
    """Not one jump: the updates of `extrapolated` full steps were repeated."""
    extrapolated: int = 0
    ended: str = ""
    """The check that ended extrapolation early."""

    def report(self) -> dict[str, Any]:
        """At its beginning."""
        out = {
            "direction": self.decision.direction,
            "horizon": self.decision.horizon,
            "confidence": self.decision.confidence,
            "check_before": self.before,
            "expected_gain": self.decision.expected,
        }
        return out if self.extrapolating else out | {"check_after": self.after, "kept": self.kept}


@dataclass
class AcceptanceReport:
    """What the acceptance test of a trial found: `credited` steps are counted without being made."""

    trial: Trial
    after: float
    """Check loss after the settle steps."""
    saved: float
    reward: float
    rate: float = 0.0
    """Fall of the check loss per full step before the jump."""
    credited: int = 0
    undone: bool = False
    pays: bool = False
    """Whether the last trials together saved more than they cost."""
    stayed_P: list[float] = field(default_factory=list)
    """How much of the jump was left after the settle steps, beside training going on along it; by place."""

    def report(self) -> dict[str, Any]:
        trial, out = self.trial, {}
        if trial.extrapolating:
            out = {
                "check_after": trial.after,
                "kept": trial.kept,
                "extrapolated": trial.extrapolated,
                "ended": trial.ended or None,
            }
        return out | {
            "check_settled": self.after,
            "steps_saved": self.saved,
            "reward": self.reward,
            "credited": self.credited,
            "undone": self.undone,
        }
