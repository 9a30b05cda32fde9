"""From the mean of one window of looks to the mean of the next: averaging first, as in LAWA (arXiv 2209.14981)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scale.parallel.ranks import Ranks
from scale.predict.weights.directions.kept import Numbers, like, zero
from scale.protocols import Shards

LOOKS = 10
"""In a window."""


class WindowMeans(Numbers):
    """Difference of the means of the last two full windows, divided by the time between their middles."""

    name = "window"
    copies = 3
    NUMBERS = ("looks", "windows", "time", "middle", "middle_before")

    def __init__(self, shards: Shards, ranks: Ranks) -> None:
        self.total, self.before, self.difference = like(shards), like(shards), like(shards)
        self.looks, self.windows = 0, 0
        self.time, self.middle, self.middle_before = 0.0, 0.0, 0.0

    def observe(self, params: Sequence[Tensor], update: Sequence[Tensor] | None, steps: int, lr: float) -> None:
        if update is None:
            self.restart()
        self.time += lr
        torch._foreach_add_(self.total, list(params))
        self.middle += self.time / LOOKS
        self.looks += 1
        if self.looks == LOOKS:
            self._close()

    def _close(self) -> None:
        """The window is full: its mean becomes the one before, and memory goes round."""
        torch._foreach_mul_(self.total, 1 / LOOKS)
        if self.windows:
            torch._foreach_sub_(self.before, self.total)
            torch._foreach_mul_(self.before, -1 / (self.middle - self.middle_before))
        self.difference, self.before, self.total = self.before, self.total, self.difference
        zero([self.total])
        self.middle_before, self.middle = self.middle, 0.0
        self.looks, self.windows = 0, self.windows + 1

    def restart(self) -> None:
        zero(self.tensors().values())
        self.looks, self.windows = 0, 0
        self.time, self.middle, self.middle_before = 0.0, 0.0, 0.0

    def vectors(self) -> list[Tensor] | None:
        return self.difference if self.windows >= 2 else None

    def tensors(self) -> dict[str, Sequence[Tensor]]:
        return {"total": self.total, "before": self.before, "difference": self.difference}
