"""The load balancing loss of mixtures of experts, where a model's config asks for it.

E experts, K of them for each token, B rows of L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale.data.rows import IGNORE
from scale.errors import UsageError
from scale.models.heads import without_adapter
from scale.protocols import Term

_BALANCED = frozenset({
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "olmoe", "flex_olmo", "gpt_oss", "granitemoe",
    "granitemoeshared", "granitemoe_swa", "granitemoehybrid", "phimoe", "jetmoe", "minimax", "minimax_m2", "ernie4_5_moe",
    "jamba", "laguna", "mellum", "flint", "dbrx",
})  # fmt: skip
"""Model types whose loss in transformers is that of Switch Transformers over `router_logits` (transformers 5.23)."""
_OTHER_LOSSES = ("z_loss_coefficient", "router_z_loss_coef")
"""Coefficients of losses that are not computed here."""


@dataclass(frozen=True)
class RouterLoss:
    """E x sum over experts of (share of tokens sent to it) x (mean probability of it), in each row by itself; both means are
    over layers and tokens, as transformers' `load_balancing_loss_func` takes them (Switch Transformers, arXiv 2101.03961).

    The loss is a product of means, so what it is of has to be said. A row is what stays the same however many rows a
    micro-batch or a rank holds, so that 1 x 8 and 8 x 1 give one loss (groups of tokens of GShard, arXiv 2006.16668;
    sequences of DeepSeek-V3, arXiv 2412.19437). Rows count by their tokens. Of one row it is transformers' own value.
    """

    experts: int
    chosen: int
    weight: float

    def count(self, targets_BL: Tensor) -> Tensor:
        """Tokens that count: those of a row up to its last learned one, which leaves padding out."""
        return _counted(targets_BL).sum()

    def term(self, logits: Sequence[Tensor], targets_BL: Tensor) -> Term:
        """From the router's logits of each layer, (B x L, E)."""
        counted_BL1 = _counted(targets_BL)[..., None]
        tokens_B1 = counted_BL1.sum(1)
        sent_BE: Tensor = torch.zeros((), device=targets_BL.device)
        probability_BE = sent_BE
        for layer in logits:
            probability_BLE = F.softmax(layer.view(*targets_BL.shape, self.experts), dim=-1, dtype=_accurate(layer))
            chosen_BLK = probability_BLE.topk(self.chosen, dim=-1).indices
            sent_BLE = torch.zeros_like(probability_BLE).scatter_(-1, chosen_BLK, 1.0)
            sent_BE = sent_BE + (sent_BLE * counted_BL1).sum(1)
            probability_BE = probability_BE + (probability_BLE * counted_BL1).sum(1)
        shares = len(logits) * tokens_B1.clamp(min=1)
        loss_B = self.experts * (sent_BE / shares * probability_BE / shares).sum(1)
        return Term((loss_B * tokens_B1[:, 0]).sum(), tokens_B1.sum(), self.weight)


def router_loss(model: nn.Module) -> RouterLoss | None:
    """What the model's config asks for; None where it asks for nothing. Raises UsageError for a loss that is not computed
    here."""
    plain = without_adapter(model)
    config: Any = getattr(plain, "config", None)
    kind = getattr(config, "model_type", None)
    for key in _OTHER_LOSSES:
        if getattr(config, key, None):
            raise UsageError(
                f"model: {key} = {getattr(config, key)}: no such loss is computed for {kind} (set it to 0)"
            )
    if not getattr(config, "output_router_logits", False):
        return None
    if kind not in _BALANCED:
        raise UsageError(
            f"model: output_router_logits = true: no router loss is computed for {kind} (set it to false; it is for "
            f"{', '.join(sorted(_BALANCED))})"
        )
    weight = getattr(plain, "router_aux_loss_coef", getattr(plain, "aux_loss_coef", 0.0))
    return RouterLoss(int(plain.num_experts), int(plain.num_experts_per_tok), float(weight))


def _counted(targets_BL: Tensor) -> Tensor:
    learned_BL = targets_BL != IGNORE
    return learned_BL.flip(1).cumsum(1).flip(1) > 0


def _accurate(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
