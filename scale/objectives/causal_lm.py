"""Next-token prediction with one global denominator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from scale.data.rows import IGNORE, WEIGHTS
from scale.models.attention import packed_masks, takes_masks
from scale.models.heads import decoder_and_head
from scale.objectives.router import RouterLoss
from scale.objectives.vocabulary import chunked_loss, cut_loss, full_loss
from scale.protocols import Batch, Loss, Term


class CausalLM:
    """Summed cross-entropy of `targets` (B, L; already shifted, -100 ignored) and its count of learned tokens.

    The mask of packed documents follows from `position_ids`, which start at 0 in each document (Hugging Face models
    look at them only where there is neither a mask nor a cache). `one_row` lays the rows of a micro-batch behind each
    other, (1, B x L), because Hugging Face's flash attention takes positions for boundaries with a single row only.
    `loss`: full, chunked or cce, as compute.loss.
    `per_document=True` also returns the loss sums of the packed documents, (B, S).
    `router`: the load balancing loss of a mixture of experts, as a term of its own in training; held-out loss and what is
    said of documents are cross-entropy alone.

    `weights` (B, L) in a batch multiply the losses of its tokens, not their count: weights that are 1 on average leave the
    expected loss and gradient as they are (Horvitz and Thompson, JASA 1952); dividing by the sum of the weights instead
    would bias them by O(1 / tokens). What is said of single documents is never weighted.
    """

    def __init__(
        self, per_document: bool = False, loss: str = "full", one_row: bool = False, router: RouterLoss | None = None
    ):
        self.per_document, self.loss, self.one_row, self.router = per_document, loss, one_row, router

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        counts = {"lm": (batch["targets"] != IGNORE).sum()}
        return counts if self.router is None else counts | {"router": self.router.count(batch["targets"])}

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        targets_BL = batch["targets"]
        balanced = self.router is not None and model.training
        loss_N, router_logits = self._token_losses(model, batch, targets_BL.flatten(), balanced)
        loss_BL = loss_N.view_as(targets_BL)
        segments_BS = None
        if self.per_document:
            segment_BL = batch["segment_ids"]
            segments_BS = loss_BL.new_zeros(len(loss_BL), int(segment_BL.max()) + 1)
            segments_BS = segments_BS.scatter_add(1, segment_BL, loss_BL)
        weighted_BL = loss_BL * batch[WEIGHTS] if WEIGHTS in batch else loss_BL
        terms = {"lm": Term(weighted_BL.sum(), (targets_BL != IGNORE).sum())}
        metrics: dict[str, Term] = {}
        if self.router is not None and balanced:
            terms["router"] = self.router.term(router_logits, targets_BL)
            metrics = {"lm_loss": terms["lm"], "router_loss": terms["router"]}
        elif self.router is not None:  # counted, so that it is missed nowhere, and of no weight
            terms["router"] = Term(loss_BL.new_zeros(()), self.router.count(targets_BL), 0.0)
        return Loss(terms, metrics, per_segment=segments_BS)

    def called(self, model: nn.Module) -> nn.Module:
        """The module whose calls make up a forward pass: what is worth compiling."""
        return decoder_and_head(model)[0] if self._by_parts(model) else model

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says with the documents and masks of this objective, (B, L, V)."""
        logits: Tensor = self._run(model, batch).logits
        return logits.view(*batch["input_ids"].shape, -1)

    def _by_parts(self, model: nn.Module) -> bool:
        """Whether decoder and head are called apart. A model that takes masks of ours cannot be asked for its router's
        logits as a whole: it would look for padding in them."""
        return self.loss != "full" or (self.router is not None and takes_masks(model))

    def _token_losses(
        self, model: nn.Module, batch: Batch, targets_N: Tensor, balanced: bool
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Losses (N,) and, where asked for, the logits of each layer's router."""
        if not self._by_parts(model):
            out = self._run(model, batch, balanced)
            return full_loss(out.logits.flatten(0, -2), targets_N), out.router_logits if balanced else ()
        decoder, head = decoder_and_head(model)
        out = self._run(decoder, batch, balanced)
        hidden_ND = out.last_hidden_state.flatten(0, 1)
        if self.loss == "full":
            loss_N = full_loss(head(hidden_ND), targets_N)
        else:
            loss_N = (chunked_loss if self.loss == "chunked" else cut_loss)(hidden_ND, head, targets_N)
        return loss_N, out.router_logits if balanced else ()

    def _run(self, module: nn.Module, batch: Batch, balanced: bool = False) -> Any:
        ids_BL, position_BL = batch["input_ids"], batch["position_ids"]
        if self.one_row:
            ids_BL, position_BL = ids_BL.view(1, -1), position_BL.view(1, -1)
        asked = packed_masks(module, position_BL)
        if self.router is not None:
            asked["output_router_logits"] = balanced
        return module(input_ids=ids_BL, position_ids=position_BL, use_cache=False, **asked)
