"""Do the packed documents of a row really not see each other? Asked of the model itself, before training."""

from __future__ import annotations

import torch
from torch import nn

from scale.errors import UsageError

_DOCUMENT = 8
"""Tokens of each of the two probe documents in a row."""


def refuse_leaks(model: nn.Module, vocab_size: int) -> None:
    """Raise UsageError if another first document changes what the model says about the second one of its row.

    Families differ: some ignore `position_ids` (their positions or states run through the row), and flash attention takes
    them for document boundaries with a single row only. Two rows are probed, and nothing is trained.
    """
    device = next(model.parameters()).device
    ids_BL = (torch.arange(4 * _DOCUMENT, device=device) % vocab_size).view(2, -1)
    other_BL = ids_BL.clone()
    other_BL[:, :_DOCUMENT] = (other_BL[:, :_DOCUMENT] + vocab_size // 2) % vocab_size
    position_BL = torch.arange(_DOCUMENT, device=device).repeat(2, 2)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        first, second = (
            model(input_ids=ids, position_ids=position_BL, use_cache=False).logits[:, _DOCUMENT:].float()
            for ids in (ids_BL, other_BL)
        )
    model.train(was_training)
    change = (first - second).abs().max().item()
    if change > 1e-4 * max(1.0, first.abs().max().item()):
        raise UsageError(
            f"model: {type(model).__name__} lets the documents of a row see each other (logits of the second moved by "
            f"{change:.2g} with the first): set data.cross_documents=true to allow that, or choose another compute.attention"
        )
