"""What directions are made of: tensors shaped like shards, and numbers that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from scale.protocols import Shards


def like(shards: Shards) -> list[Tensor]:
    """Zeros in the shapes of the local shards."""
    return [torch.zeros_like(shard.param.detach(), dtype=torch.float32) for shard in shards.values()]


def zero(lists: Iterable[Sequence[Tensor]]) -> None:
    """Set all tensors of the lists to zero."""
    for tensors in lists:
        torch._foreach_zero_(list(tensors))


class Numbers:
    """State of plain numbers: the attributes that the class names in `NUMBERS`."""

    NUMBERS: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.NUMBERS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.NUMBERS:
            setattr(self, name, state[name])
