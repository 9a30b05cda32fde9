"""What a run spent and what it saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Ledger:
    """Counts since the run began, the same on every rank but for `divergences`, which rank 0 counts."""

    full: int = 0
    """Real steps that were applied, those after jumps included."""
    full_tokens: int = 0
    predicted: int = 0
    """Steps that were counted without being made."""
    rejected: int = 0
    """Steps of jumps that were taken back."""
    skipped: int = 0
    attempts: int = 0
    accepted: int = 0
    check_forwards: int = 0
    check_tokens: int = 0
    documents_skipped: int = 0
    """Pieces of documents that selection left out."""
    tokens_skipped: int = 0
    probe_forwards: int = 0
    """Forward passes on documents that selection was unsure of."""
    probe_tokens: int = 0
    divergences: int = 0
    """Signs of divergence in full steps."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock of `full` steps (statistics included), the `world` model and `check`s. Nothing is decided by it."""

    def spend(self, part: str, seconds: float) -> None:
        """Add to the time of a part."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def counts(self) -> dict[str, int]:
        """All but the seconds."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
