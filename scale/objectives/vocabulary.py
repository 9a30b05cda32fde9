"""Cross-entropy over the vocabulary, token by token, in three ways that differ in memory alone.

N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scale.data.rows import IGNORE
from scale.errors import MissingExtra

CHUNK = 2**26
"""Logits of one chunk (tokens x vocabulary): 256 MiB in fp32."""


def full_loss(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy of each token in fp32, (N,); 0 where the target is ignored."""
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORE, reduction="none")


def chunked_loss(hidden_ND: Tensor, head: nn.Linear, targets_N: Tensor, size: int | None = None) -> Tensor:
    """`full_loss(head(hidden_ND), targets_N)` with the logits of `size` tokens at a time, made again in backward."""
    size = size or max(1, CHUNK // head.out_features)

    def part(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return full_loss(head(hidden_CD), targets_C)

    parts = [
        checkpoint(part, hidden_CD, targets_C, use_reentrant=False)
        for hidden_CD, targets_C in zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    ]
    return torch.cat(parts)


def cut_loss(hidden_ND: Tensor, head: nn.Linear, targets_N: Tensor) -> Tensor:
    """Cut-Cross-Entropy (arXiv 2411.09009): no logits in memory at all. CUDA and bf16 only; untested here."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        raise MissingExtra("compute.loss = 'cce'", "cce") from None
    dtype = torch.bfloat16
    bias = head.bias.to(dtype) if head.bias is not None else None
    loss_N: Tensor = linear_cross_entropy(
        hidden_ND.to(dtype), head.weight.to(dtype), targets_N, bias=bias, ignore_index=IGNORE, reduction="none"
    )
    return loss_N.float()
