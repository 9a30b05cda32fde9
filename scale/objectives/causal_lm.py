"""Next-token prediction with one global denominator."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from scale.data.rows import IGNORE
from scale.protocols import Batch, Loss, Term


class CausalLM:
    """Summed cross-entropy of `targets` (B, L; already shifted, -100 ignored) and its count of learned tokens.

    The mask of packed documents follows from `position_ids`, which start at 0 in each document (Hugging Face models
    look at them only where there is neither a mask nor a cache).
    `per_document=True` also returns the loss sums of the packed documents, (B, S).
    """

    def __init__(self, per_document: bool = False):
        self.per_document = per_document

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"lm": (batch["targets"] != IGNORE).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        targets_BL = batch["targets"]
        out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        logits_BLV = out.logits.float()
        loss_BL = F.cross_entropy(
            logits_BLV.flatten(0, 1), targets_BL.flatten(), ignore_index=IGNORE, reduction="none"
        ).view_as(targets_BL)
        segments_BS = None
        if self.per_document:
            segment_BL = batch["segment_ids"]
            segments_BS = loss_BL.new_zeros(len(loss_BL), int(segment_BL.max()) + 1)
            segments_BS = segments_BS.scatter_add(1, segment_BL, loss_BL)
        return Loss({"lm": Term(loss_BL.sum(), self.counts(batch)["lm"])}, per_segment=segments_BS)
