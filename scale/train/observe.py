"""Gradient norms per layer, looked at between clipping and the optimizer step."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from scale.protocols import Observe, Shards

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def layer_of(name: str) -> str:
    """ "layer.3" for parameters of a numbered block, otherwise the name of the module that holds the parameter."""
    block = _BLOCK.search(name)
    if block:
        return f"layer.{block[1]}"
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else name


class Watcher(Protocol):
    """Looks at weights and gradients in some steps, after clipping and before the optimizer moves anything."""

    def due(self, step: int) -> bool: ...

    def __call__(self, shards: Shards) -> None: ...


def together(watchers: Sequence[Watcher]) -> Observe | None:
    """One look for all of them; None if there are none."""

    def look(shards: Shards) -> None:
        for watcher in watchers:
            watcher(shards)

    return look if watchers else None


class LayerGradients:
    """Collects the global gradient norm of each layer; `last` maps layer to norm after an observed step."""

    def __init__(self, all_sum: Callable[[Tensor], Tensor], every: int = 1):
        self.all_sum, self.every = all_sum, every
        self.last: dict[str, float] = {}

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

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
