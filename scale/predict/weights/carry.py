"""How far a direction really carried: what became of the weights, beside what a straight line had foreseen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scale.parallel.ranks import Ranks
from scale.predict.weights.directions.kept import Numbers, like
from scale.predict.weights.sums import KindSums
from scale.protocols import Shards

_PD, _DD = 2, 7


class Carry(Numbers):
    """Keeps the weights and a direction of one moment, its anchor, and holds later weights against them.

    Read at every `every`-th look; after `span` of them the anchor moves up to the present.
    """

    NUMBERS = ("anchored", "looks", "steps", "time", "last", "last_steps")

    def __init__(self, ranks: Ranks, shards: Shards, every: int = 5, span: int = 20):
        self.sums = KindSums(ranks, shards)
        self.every, self.span = every, span
        self.params, self.direction = like(shards), like(shards)
        self.last: list[float] | None = None
        """For each kind <p now - p then, d> / (sum of lr factors since x <d, d>), in straight lines: 1 is exactly as
        foreseen, nan where there is no such kind or no direction. None unless the last look was a reading."""
        self.last_steps = 0
        """Steps that the last reading reached over."""
        self._reach = 0.0
        self.restart()

    def restart(self) -> None:
        """The weights were moved by something that was not training: the next look makes a new anchor."""
        self.anchored, self.looks, self.steps, self.time = False, 0, 0, 0.0

    def measure(
        self, params: Sequence[Tensor], direction: Sequence[Tensor] | None, steps: int, lr: float
    ) -> Tensor | None:
        """A look: `steps` whose lr factors add up to `lr` lie since the last one. At a reading the products that `read`
        wants over all ranks, as `KindSums.encode` gives them; the device is not waited for."""
        self.last = None
        self.looks, self.steps, self.time = self.looks + 1, self.steps + steps, self.time + lr
        table = None
        if self.anchored and self.looks % self.every == 0 and self.time > 0:
            moved = torch._foreach_sub(list(params), self.params)
            table = self.sums.encode(moved, None, self.direction, None)
            self.last_steps, self._reach = self.steps, self.time
        if direction is not None and (not self.anchored or self.looks >= self.span):
            torch._foreach_copy_(self.params, list(params))
            torch._foreach_copy_(self.direction, list(direction))
            self.anchored, self.looks, self.steps, self.time = True, 0, 0, 0.0
        return table

    def read(self, table_GC: np.ndarray) -> None:
        """Take what `measure` gave, summed over all ranks."""
        line_G = self._reach * table_GC[:, _DD]
        with np.errstate(divide="ignore", invalid="ignore"):
            self.last = np.where(line_G > 0, table_GC[:, _PD] / line_G, np.nan).tolist()

    def companions(self) -> dict[str, Sequence[Tensor]]:
        """What checkpoints hold in the shape of shards."""
        return {"params": self.params, "direction": self.direction}
