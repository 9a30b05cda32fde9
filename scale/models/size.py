"""Arithmetic about a model before it runs: parameters, FLOPs, memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from scale.models.roles import MATRICES, roles_of, tied_to_head


@dataclass(frozen=True)
class Size:
    """Parameter counts. `matrix` counts weights that multiply activations in a forward pass: a tied head once, of experts
    those that one token visits."""

    total: int
    trainable: int
    matrix: int


def model_size(model: nn.Module) -> Size:
    """Count parameters; an input embedding that is not also the output head is a lookup and costs no FLOPs."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = getattr(model, "config", None)
    experts, visited = experts_of(config)
    roles, tied = roles_of(model), tied_to_head(model)
    matrix = sum(p.numel() for p, role in roles.items() if role in MATRICES or p in tied)
    stacked = sum(p.numel() for p, role in roles.items() if role == "stack" and len(p) == experts)
    resting = stacked - stacked * visited // max(experts, 1)
    return Size(total, trainable, matrix - resting)


def experts_of(config: PretrainedConfig | None) -> tuple[int, int]:
    """Experts in each layer of a mixture, and how many of them a token visits; (0, 1) for a dense model."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), 0)
    return experts, getattr(config, "num_experts_per_tok", None) or 1


def flops_per_token(size: Size, config: PretrainedConfig, seq_len: int) -> float:
    """Forward and backward FLOPs of one token: 6 per matrix weight plus attention (PaLM, arXiv 2204.02311, appendix B).

    Attention counts 12 x layers x heads x head_dim x length, not halved for the causal mask, as is usual for MFU.
    Weights that are not trained skip the third product: 4 instead of 6.
    """
    heads = getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // max(heads, 1))
    frozen = size.total - size.trainable
    dense = 6 * size.matrix - 2 * min(frozen, size.matrix)
    return dense + 12 * getattr(config, "num_hidden_layers", 0) * heads * head_dim * seq_len


def activation_bytes_per_token(
    config: PretrainedConfig, recompute_every: int | None, bytes_per_value: int, logits: bool = True
) -> int:
    """Rough upper estimate of what backward keeps for one token: about 14 model widths and 4 ffn widths a layer (for each
    expert it visits), and logits, unless the loss is chunked.

    An estimate for choosing the micro-batch; the dry run decides.
    """
    d, f = (
        getattr(config, "hidden_size", 0),
        getattr(config, "intermediate_size", 0) or 4 * getattr(config, "hidden_size", 0),
    )
    f *= experts_of(config)[1]
    layers, vocab = getattr(config, "num_hidden_layers", 0), getattr(config, "vocab_size", 0)
    kept = layers if recompute_every is None else layers - len(range(0, layers, recompute_every))
    return kept * (14 * d + 4 * f) * bytes_per_value + (layers - kept) * d * bytes_per_value + 3 * vocab * 4 * logits
