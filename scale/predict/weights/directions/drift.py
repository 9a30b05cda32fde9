"""The smoothed update: an exponential average of displacements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scale.parallel.ranks import Ranks
from scale.predict.weights.directions.kept import Numbers, like
from scale.protocols import Shards

DECAY = 0.95
"""What is left of a displacement's weight after a step."""


class Drift(Numbers):
    """Bias-corrected as in Adam (arXiv 1412.6980): an average of what was seen, never of the zeros at the start."""

    name = "drift"
    copies = 0  # `Looks` keeps it, whether it is chosen or not
    NUMBERS = ("mass",)

    def __init__(self, shards: Shards, ranks: Ranks) -> None:
        self.mean = like(shards)
        self.mass = 0.0

    def observe(self, params: Sequence[Tensor], update: Sequence[Tensor] | None, steps: int, lr: float) -> None:
        if update is None:
            return
        new = 1 - DECAY**steps
        self.mass = DECAY**steps * self.mass + new
        torch._foreach_lerp_(self.mean, list(update), new / self.mass)

    def restart(self) -> None:
        """A speed stays what it is wherever the weights are put."""

    def vectors(self) -> list[Tensor] | None:
        return self.mean if self.mass else None

    def tensors(self) -> dict[str, Sequence[Tensor]]:
        return {"mean": self.mean}
