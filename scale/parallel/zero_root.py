"""The wrapped root between DeepSpeed and the stepper: its hooks find tensors in dicts and lists only."""

from __future__ import annotations

from typing import Any

from torch import nn

from scale.objectives.root import Root
from scale.protocols import Batch, Loss, Term


class TensorsOnly(nn.Module):
    """A root whose result is made of dicts and lists."""

    def __init__(self, root: Root):
        super().__init__()
        self.root = root

    def forward(self, batch: Batch) -> dict[str, Any]:
        loss = self.root(batch)
        return {
            "terms": {name: [term.total, term.count, term.weight] for name, term in loss.terms.items()},
            "metrics": {name: [term.total, term.count, term.weight] for name, term in loss.metrics.items()},
            "per_segment": loss.per_segment,
        }


class Engined(nn.Module):
    """DeepSpeed's engine with a `Loss` as its result."""

    def __init__(self, engine: nn.Module):
        super().__init__()
        self.engine = engine

    def forward(self, batch: Batch) -> Loss:
        out = self.engine(batch)
        return Loss(
            {name: Term(*term) for name, term in out["terms"].items()},
            {name: Term(*term) for name, term in out["metrics"].items()},
            out["per_segment"],
        )
