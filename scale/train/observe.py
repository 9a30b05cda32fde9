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
        layers = list(dict.fromkeys(layer_of(name) for name in shards))  # all names, also those without a part here
        mine = [s for s in shards.values() if s.grad is not None and s.grad.numel()]
        total = torch.zeros(len(layers))
        if mine:
            norms = torch.stack(torch._foreach_norm([s.grad for s in mine])).float().cpu()  # type: ignore[misc]
            squares = norms.square() / torch.tensor([float(s.copies) for s in mine])
            total.index_add_(0, torch.tensor([layers.index(layer_of(s.name)) for s in mine]), squares)
        total = self.all_sum(total)
        self.last = dict(zip(layers, total.sqrt().tolist(), strict=True))
