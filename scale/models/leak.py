"""Do the packed documents of a row really not see each other? Asked of the model itself, before training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scale.errors import UsageError
from scale.models.modes import evaluating
from scale.protocols import Batch, Loss, Term

_DOCUMENT = 8
"""Tokens of each of the two probe documents in a row."""


def refuse_leaks(root: nn.Module, vocab_size: int, wrapped: nn.Module | None = None) -> None:
    """Raise UsageError if another first document changes what the model says about the second one of its row.

    Families differ: some ignore `position_ids` (their positions or states run through the row), and flash attention takes
    them for document boundaries with a single row only. Two rows are probed, and nothing is trained. `wrapped` is what
    the strategy made of `root`, a Root: where weights are sharded, only a call through it can gather them. Collective.
    """
    inner: Any = root
    wrapped = root if wrapped is None else wrapped
    device = next(wrapped.parameters()).device
    ids_BL = (torch.arange(4 * _DOCUMENT, device=device) % vocab_size).view(2, -1)
    other_BL = ids_BL.clone()
    other_BL[:, :_DOCUMENT] = (other_BL[:, :_DOCUMENT] + vocab_size // 2) % vocab_size
    position_BL = torch.arange(_DOCUMENT, device=device).repeat(2, 2)
    objective = inner.objective
    inner.objective = partial(_second_document, getattr(objective, "logits", _plain_logits))
    try:
        # a probe of this size would be compiled for nothing
        with evaluating(wrapped), torch.compiler.set_stance("force_eager"):
            first, second = (
                wrapped({"input_ids": ids, "position_ids": position_BL}).metrics["logits"].total
                for ids in (ids_BL, other_BL)
            )
    finally:
        inner.objective = objective
    change = (first - second).abs().max().item()
    if change > 1e-4 * max(1.0, first.abs().max().item()):
        raise UsageError(
            f"model: {type(inner.model).__name__} lets the documents of a row see each other (logits of the second "
            f"moved by {change:.2g} with the first): set data.cross_documents=true to allow that, or choose another "
            "compute.attention"
        )


def _second_document(logits: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batch: Batch) -> Loss:
    """Logits of the second document of each row, (B, 8, V), as the objective has them. Stands in for it, as a metric
    because strategies may know no other results than a Loss."""
    logits_B8V = logits(model, batch)[:, _DOCUMENT:].float()
    return Loss({}, {"logits": Term(logits_B8V, logits_B8V.new_tensor(float(logits_B8V.numel())))})


def _plain_logits(model: nn.Module, batch: Batch) -> Tensor:
    logits_BLV: Tensor = model(**batch, use_cache=False).logits
    return logits_BLV
