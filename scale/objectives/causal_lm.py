"""Next-token prediction with one global denominator."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from scale.data.rows import IGNORE, WEIGHTS
from scale.models.attention import packed_masks
from scale.models.heads import decoder_and_head
from scale.objectives.vocabulary import chunked_loss, cut_loss, full_loss
from scale.protocols import Batch, Loss, Term


class CausalLM:
    """Summed cross-entropy of `targets` (B, L; already shifted, -100 ignored) and its count of learned tokens.

    The mask of packed documents follows from `position_ids`, which start at 0 in each document (Hugging Face models
    look at them only where there is neither a mask nor a cache). `one_row` lays the rows of a micro-batch behind each
    other, (1, B x L), because Hugging Face's flash attention takes positions for boundaries with a single row only.
    `loss`: full, chunked or cce, as compute.loss.
    `per_document=True` also returns the loss sums of the packed documents, (B, S).

    `weights` (B, L) in a batch multiply the losses of its tokens, not their count: weights that are 1 on average leave the
    expected loss and gradient as they are (Horvitz and Thompson, JASA 1952); dividing by the sum of the weights instead
    would bias them by O(1 / tokens). What is said of single documents is never weighted.
    """

    def __init__(self, per_document: bool = False, loss: str = "full", one_row: bool = False):
        self.per_document, self.loss, self.one_row = per_document, loss, one_row

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"lm": (batch["targets"] != IGNORE).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        targets_BL = batch["targets"]
        loss_BL = self._token_losses(model, batch, targets_BL.flatten()).view_as(targets_BL)
        segments_BS = None
        if self.per_document:
            segment_BL = batch["segment_ids"]
            segments_BS = loss_BL.new_zeros(len(loss_BL), int(segment_BL.max()) + 1)
            segments_BS = segments_BS.scatter_add(1, segment_BL, loss_BL)
        weighted_BL = loss_BL * batch[WEIGHTS] if WEIGHTS in batch else loss_BL
        return Loss({"lm": Term(weighted_BL.sum(), self.counts(batch)["lm"])}, per_segment=segments_BS)

    def called(self, model: nn.Module) -> nn.Module:
        """The module whose calls make up a forward pass: what is worth compiling."""
        return model if self.loss == "full" else decoder_and_head(model)[0]

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says with the documents and masks of this objective, (B, L, V)."""
        logits: Tensor = self._run(model, batch).logits
        return logits.view(*batch["input_ids"].shape, -1)

    def _token_losses(self, model: nn.Module, batch: Batch, targets_N: Tensor) -> Tensor:
        if self.loss == "full":
            return full_loss(self.logits(model, batch).flatten(0, 1), targets_N)
        decoder, head = decoder_and_head(model)
        hidden_ND = self._run(decoder, batch).last_hidden_state.flatten(0, 1)
        return (chunked_loss if self.loss == "chunked" else cut_loss)(hidden_ND, head, targets_N)

    def _run(self, module: nn.Module, batch: Batch) -> Any:
        ids_BL, position_BL = batch["input_ids"], batch["position_ids"]
        if self.one_row:
            ids_BL, position_BL = ids_BL.view(1, -1), position_BL.view(1, -1)
        masks = packed_masks(module, position_BL)
        return module(input_ids=ids_BL, position_ids=position_BL, use_cache=False, **masks)
