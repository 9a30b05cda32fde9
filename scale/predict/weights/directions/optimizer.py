"""The last update, repeated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scale.parallel.ranks import Ranks
from scale.predict.weights.directions.kept import Numbers, like
from scale.protocols import Shards


class LastUpdate(Numbers):
    """What the optimizer did between the last two looks."""

    name = "optimizer"
    copies = 1
    NUMBERS = ("seen",)

    def __init__(self, shards: Shards, ranks: Ranks) -> None:
        self.last = like(shards)
        self.seen = False

    def observe(self, params: Sequence[Tensor], update: Sequence[Tensor] | None, steps: int, lr: float) -> None:
        if update is not None:
            torch._foreach_copy_(self.last, list(update))
            self.seen = True

    def restart(self) -> None:
        self.seen = False

    def vectors(self) -> list[Tensor] | None:
        return self.last if self.seen else None

    def tensors(self) -> dict[str, Sequence[Tensor]]:
        return {"last": self.last}
