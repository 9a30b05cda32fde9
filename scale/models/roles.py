"""What each parameter of a model is for. Decided by the module that owns it, not by its number of dimensions: there are biases
and norms of two dimensions (one row for each expert or head), and matrices of three."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Role = Literal["matrix", "stack", "head", "embedding", "norm", "bias", "vector"]
"""matrix: multiplies activations, routers included. stack: several matrices in one tensor (experts) or the kernels of a
convolution. head: the matrix that makes logits. embedding: rows that are looked up, also where the head is tied to them.
vector: everything else that scales, shifts or starts something."""

MATRICES: frozenset[Role] = frozenset(["matrix", "stack", "head"])
"""Roles of what multiplies activations."""
_BIAS = re.compile(r"(^|_)(bias|b\d)(_|$)")
_LOOKED_UP = re.compile(r"(^|_)(pos_)?emb(ed|edding)?s?($|_)|rel_pos")
_VECTOR = re.compile(r"^(A_log|D|dt|scale|gain|gamma|beta|time_\w+|layer_?scale\w*)$")
"""Of state space models (which their authors do not decay, arXiv 2312.00752), gains, and mixing weights of RWKV."""


def roles_of(model: nn.Module) -> dict[Tensor, Role]:
    """The role of each parameter, in the order of `model.parameters()`. A tied parameter has the role of its first owner."""
    heads = set(_heads(model))
    out: dict[Tensor, Role] = {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if param not in out:
                out[param] = _role(module, name, param, module in heads)
    return out


def tied_to_head(model: nn.Module) -> set[Tensor]:
    """Weights of heads that are also something else's, and so have another role than head."""
    roles = roles_of(model)
    return {head.weight for head in _heads(model) if roles.get(head.weight, "head") != "head"}


def _role(module: nn.Module, name: str, param: Tensor, is_head: bool) -> Role:
    if isinstance(module, nn.Embedding) or _LOOKED_UP.search(name):
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if _BIAS.search(name):
        return "bias"
    if isinstance(module, nn.Linear | Conv1D):
        return "head" if is_head else "matrix"
    if param.ndim < 2 or param.numel() == max(param.shape) or _VECTOR.search(name):
        return "vector"
    return "stack" if param.ndim > 2 else "matrix"


def _heads(model: nn.Module) -> Iterator[Any]:
    for name, module in model.named_modules():
        found: Any = None
        if name.rpartition(".")[2] in ("lm_head", "embed_out"):
            found = module
        elif hasattr(module, "get_output_embeddings"):
            found = module.get_output_embeddings()
        if isinstance(found, nn.Linear):
            yield found
