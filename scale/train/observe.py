"""Gradient norms per layer, looked at between clipping and the optimizer step."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from scale.protocols import Shards

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def layer_of(name: str) -> str:
    """ "layer.3" for parameters of a numbered block, otherwise the name of the module that holds the parameter."""
    block = _BLOCK.search(name)
    if block:
        return f"layer.{block[1]}"
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else name


class LayerGradients:
    """Collects the global gradient norm of each layer; `last` maps layer to norm after an observed step."""

    def __init__(self, all_sum: Callable[[Tensor], Tensor]):
        self.all_sum = all_sum
        self.last: dict[str, float] = {}

    def __call__(self, shards: Shards) -> None:
        with_grad = [shard for shard in shards.values() if shard.grad is not None]
        squares = torch.stack(torch._foreach_norm([s.grad for s in with_grad])).float().square()  # type: ignore[misc]
        layers = list(dict.fromkeys(layer_of(s.name) for s in with_grad))
        index = torch.tensor([layers.index(layer_of(s.name)) for s in with_grad], device=squares.device)
        total = self.all_sum(squares.new_zeros(len(layers)).index_add(0, index, squares))
        self.last = dict(zip(layers, total.sqrt().tolist(), strict=True))
