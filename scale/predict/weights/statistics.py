"""Parameter and gradient statistics, between clipping and the optimizer step: all that prediction knows of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale.config.predict import DirectionName
from scale.errors import ScaleError
from scale.parallel.ranks import Ranks
from scale.predict.moments import Statistics
from scale.predict.packing import pack_array, unpack_array
from scale.predict.weights.carry import Carry
from scale.predict.weights.directions import DIRECTIONS, Direction, SmoothedUpdate, like
from scale.predict.weights.sums import KindSums
from scale.protocols import Shards, Strategy

_ONE_U, _TWO_U = [3, 6, 8], 9
"""Columns in which the update is once and twice."""


class StatisticsHook:
    """Hook of a strategy's `update`. Reads weights and gradients, never writes them, draws no random number.

    Every step: `begin`, the update with this hook if `due`, and `moved` if it was applied.
    """

    def __init__(self, ranks: Ranks, shards: Shards, directions: Sequence[DirectionName], every: int = 1):
        """Takes all memory that statistics ever need. Collective."""
        self.every, self.names = every, list(shards)
        self.sums = KindSums(ranks, shards)
        self.carry = Carry(KindSums(ranks, shards), shards)
        self.previous = like(shards)
        self.smoothed = SmoothedUpdate(shards)
        self.directions: dict[str, Direction] = {name: DIRECTIONS[name](shards) for name in directions}
        self.last: Statistics | None = None
        self.step, self.steps, self.lr = 0, 0, 0.0
        self.fresh = True

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def begin(self, step: int) -> None:
        """The number of the step that is about to be made."""
        self.step = step

    def moved(self, lr_factor: float) -> None:
        """A step was applied at this factor of the peak learning rate."""
        self.steps, self.lr = self.steps + 1, self.lr + lr_factor

    def extrapolate(self, strategy: Strategy, ratio: int, lr_factor: float) -> None:
        """Repeat the update of the step that was just made `ratio` times. `previous` are the weights before it: the next
        statistics see one longer update, at learning rates that add up to as much more."""
        assert self.last is not None and self.last.step == self.step, "the hook did not run in this step"
        with strategy.edit_masters() as shards:
            params = [shard.param.detach() for shard in shards.values()]
            torch._foreach_lerp_(params, self.previous, -float(ratio))
        self.steps, self.lr = self.steps + ratio, self.lr + ratio * lr_factor

    def restart(self) -> None:
        """The weights were moved by a jump (and not put back): that is no step of training to learn from."""
        self.fresh = True
        for direction in self._followed().values():
            direction.restart()
        self.carry.restart()

    @torch.no_grad()
    def __call__(self, shards: Shards) -> None:
        """Collective; waits for the device once."""
        params = [shard.param.detach() for shard in shards.values()]
        grads = [torch.zeros_like(s.param) if s.grad is None else s.grad.contiguous() for s in shards.values()]
        steps, lr = (0, 0.0) if self.fresh else (self.steps, self.lr)
        update = self._update(params, lr)
        if self.fresh or update is not None:
            for direction in self._followed().values():
                direction.observe(params, update, steps, lr)
        tables = [self.sums.encode(params, grads, self.smoothed.vectors(), update)]
        reading = self.carry.measure(params, self.smoothed.vectors(), steps, lr)
        table_MGC = self.sums.whole(tables if reading is None else [*tables, reading])
        if reading is not None:
            self.carry.read(table_MGC[1])
        self.last = Statistics(self.step, _per_step(table_MGC[0], steps, lr), self.sums.elements_G)
        torch._foreach_copy_(self.previous, params)
        self.steps, self.lr, self.fresh = 0, 0.0, False

    def ready(self) -> list[str]:
        """Directions that are known by now."""
        return [name for name, direction in self.directions.items() if direction.vectors() is not None]

    def carried(self, step: int) -> list[float] | None:
        """What `Carry` read in this step, if it did."""
        return self.carry.last if self.last is not None and self.last.step == step else None

    def _update(self, params: list[Tensor], lr: float) -> list[Tensor] | None:
        """Displacement since the statistics before divided by `lr`, in the memory of the last weights; None without any."""
        if lr <= 0:
            return None
        torch._foreach_sub_(self.previous, params)
        torch._foreach_mul_(self.previous, -1 / lr)
        return self.previous

    def _followed(self) -> dict[str, Direction]:
        return {"smoothed": self.smoothed, **self.directions}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Key -> parameter name -> local tensor, always the same keys: auxiliary sharded state, which is also read back in
        place after `load_state_dict`."""
        lists: dict[str, Sequence[Tensor]] = {"statistics.previous": self.previous}
        for name, kept in {**self._followed(), "carry": self.carry}.items():
            lists |= {f"{name}.{key}": tensors for key, tensors in kept.tensors().items()}
        return {key: dict(zip(self.names, tensors, strict=True)) for key, tensors in lists.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "lr": self.lr,
            "fresh": self.fresh,
            "last": None if self.last is None else [self.last.step, pack_array(self.last.table_GC)],
            "directions": {name: d.state_dict() for name, d in self._followed().items()},
            "carry": self.carry.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ScaleError if other directions were saved."""
        ours, saved = set(self.directions), set(state["directions"]) - {"smoothed"}
        if ours != saved:
            raise ScaleError(
                f"the checkpoint holds the predict.directions {', '.join(sorted(saved))}, this run wants "
                f"{', '.join(sorted(ours))}: go on with the same ones, or without prediction"
            )
        self.steps, self.lr, self.fresh = state["steps"], state["lr"], state["fresh"]
        self.last = None
        if state["last"] is not None:
            step, table = state["last"]
            self.last = Statistics(step, unpack_array(table), self.sums.elements_G)
        for name, direction in self._followed().items():
            direction.load_state_dict(state["directions"][name])
        self.carry.load_state_dict(state["carry"])


def _per_step(table_GC: np.ndarray, steps: int, lr: float) -> np.ndarray:
    """Products with the update as it was, per step, from those with the update at lr factor 1."""
    ratio = lr / steps if steps else 0.0
    table_GC[:, _ONE_U] *= ratio
    table_GC[:, _TWO_U] *= ratio**2
    return table_GC
