"""How far the smoothed update really carried: what became of the weights, beside what a straight line had foreseen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scale.predict.weights.directions import Kept, like
from scale.predict.weights.sums import KindSums
from scale.protocols import Shards

_PD, _DD = 2, 7


class Carry(Kept):
    """Keeps the weights and the smoothed update of one moment, its anchor, and holds later weights against them.

    Read at every `every`-th call; after `span` of them the anchor moves up to the present.
    """

    NUMBERS = ("anchored", "seen", "steps", "time", "last", "last_steps")

    def __init__(self, sums: KindSums, shards: Shards, every: int = 5, span: int = 20):
        self.sums, self.every, self.span = sums, every, span
        self.params, self.direction = like(shards), like(shards)
        self.last: list[float] | None = None
        """For each kind <p now - p then, d> / (sum of lr factors since x <d, d>), in straight lines: 1 is exactly as
        foreseen, nan where there is no such kind or no direction. None unless the last call was a reading."""
        self.last_steps = 0
        """Steps that the last reading reached over."""
        self._reach = 0.0
        self.restart()

    def restart(self) -> None:
        """The weights were moved by something that was not training: the next call makes a new anchor."""
        self.anchored, self.seen, self.steps, self.time = False, 0, 0, 0.0

    def measure(
        self, params: Sequence[Tensor], direction: Sequence[Tensor] | None, steps: int, lr: float
    ) -> Tensor | None:
        """`steps` whose lr factors add up to `lr` lie since the last call. At a reading the products that `read` wants over
        all ranks, as `KindSums.encode` gives them; the device is not waited for."""
        self.last = None
        self.seen, self.steps, self.time = self.seen + 1, self.steps + steps, self.time + lr
        table = None
        if self.anchored and self.seen % self.every == 0 and self.time > 0:
            moved = torch._foreach_sub(list(params), self.params)
            table = self.sums.encode(moved, None, self.direction, None)
            self.last_steps, self._reach = self.steps, self.time
        if direction is not None and (not self.anchored or self.seen >= self.span):
            torch._foreach_copy_(self.params, list(params))
            torch._foreach_copy_(self.direction, list(direction))
            self.anchored, self.seen, self.steps, self.time = True, 0, 0, 0.0
        return table

    def read(self, table_GC: np.ndarray) -> None:
        """Take what `measure` gave, summed over all ranks."""
        line_G = self._reach * table_GC[:, _DD]
        with np.errstate(divide="ignore", invalid="ignore"):
            self.last = np.where(line_G > 0, table_GC[:, _PD] / line_G, np.nan).tolist()

    def tensors(self) -> dict[str, Sequence[Tensor]]:
        return {"params": self.params, "direction": self.direction}
