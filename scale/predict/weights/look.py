"""Looks at weights and gradients between clipping and the optimizer step: all that prediction knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale.config.predict import DirectionName
from scale.errors import ScaleError
from scale.parallel.ranks import Ranks
from scale.predict.moments import GroupStats
from scale.predict.packing import pack_array, unpack_array
from scale.predict.weights.carry import Carry
from scale.predict.weights.directions.drift import Drift
from scale.predict.weights.directions.kept import like
from scale.predict.weights.directions.protocol import Direction
from scale.predict.weights.directions.table import DIRECTIONS
from scale.predict.weights.sums import KindSums
from scale.protocols import Shards, Strategy

_ONE_U, _TWO_U = [3, 6, 8], 9
"""Columns in which the update is once and twice."""


class Looks:
    """The observer of a strategy's `update`. Reads weights and gradients, never writes them, draws no random number.

    Every step: `begin`, the update with this as `observe` if `due`, and `moved` if it was applied. Raises UsageError for
    directions that cannot work with these shards.
    """

    def __init__(
        self,
        ranks: Ranks,
        shards: Shards,
        directions: Sequence[DirectionName],
        every: int = 1,
        carry: Carry | None = None,
    ):
        """Takes all memory that looks ever need. `carry` follows the drift. Collective."""
        self.every, self.carry = every, carry
        self.sums = KindSums(ranks, shards)
        self.names = list(shards)
        self.previous = like(shards)
        self.drift = Drift(shards, ranks)
        self.directions: dict[str, Direction] = {
            name: self.drift if name == "drift" else DIRECTIONS[name](shards, ranks) for name in directions
        }
        self.last: GroupStats | None = None
        """The last look."""
        self.step, self.steps, self.lr = 0, 0, 0.0
        self.fresh = True

    def due(self, step: int) -> bool:
        """Whether this step is looked at."""
        return step % self.every == 0

    def begin(self, step: int) -> None:
        """The number of the step that is about to be made."""
        self.step = step

    def moved(self, lr_factor: float) -> None:
        """A step was applied at this factor of the peak learning rate."""
        self.steps, self.lr = self.steps + 1, self.lr + lr_factor

    def carry_on(self, strategy: Strategy, steps: int, lr_factor: float) -> None:
        """Repeat the update of the step that was just made `steps` times. It was looked at, so `previous` are the weights
        before it: the next look sees one longer update, at learning rates that add up to as much more."""
        assert self.last is not None and self.last.step == self.step, "the step was not looked at"
        with strategy.edit_masters() as shards:
            params = [shard.param.detach() for shard in shards.values()]
            torch._foreach_lerp_(params, self.previous, -float(steps))
        self.steps, self.lr = self.steps + steps, self.lr + steps * lr_factor

    def restart(self) -> None:
        """The weights were moved by a jump (and not put back): that is no step of training to learn from."""
        self.fresh = True
        for direction in self._observers().values():
            direction.restart()
        if self.carry is not None:
            self.carry.restart()

    @torch.no_grad()
    def __call__(self, shards: Shards) -> None:
        """Look. Collective; waits for the device once."""
        params = [shard.param.detach() for shard in shards.values()]
        grads = [torch.zeros_like(s.param) if s.grad is None else s.grad.contiguous() for s in shards.values()]
        steps, lr = (0, 0.0) if self.fresh else (self.steps, self.lr)
        update = self._update(params, lr)
        if self.fresh or update is not None:
            for direction in self._observers().values():
                direction.observe(params, update, steps, lr)
        tables = [self.sums.encode(params, grads, self.drift.vectors(), update)]
        reading = self.carry.measure(params, self.drift.vectors(), steps, lr) if self.carry else None
        table_MGC = self.sums.whole(tables if reading is None else [*tables, reading])
        if self.carry and reading is not None:
            self.carry.read(table_MGC[1])
        self.last = GroupStats(self.step, _per_step(table_MGC[0], steps, lr), self.sums.elements_G)
        torch._foreach_copy_(self.previous, params)
        self.steps, self.lr, self.fresh = 0, 0.0, False

    def ready(self) -> list[str]:
        """Directions that have vectors by now."""
        return [name for name, direction in self.directions.items() if direction.vectors() is not None]

    def _update(self, params: list[Tensor], lr: float) -> list[Tensor] | None:
        """Displacement since the last look divided by `lr`, in the memory of the last weights; None if there is none."""
        if lr <= 0:
            return None
        torch._foreach_sub_(self.previous, params)
        torch._foreach_mul_(self.previous, -1 / lr)
        return self.previous

    def _observers(self) -> dict[str, Direction]:
        """The drift, chosen or not, and all other directions."""
        return {"drift": self.drift, **self.directions}

    def companions(self) -> dict[str, dict[str, Tensor]]:
        """Key -> parameter name -> local tensor, always the same keys: for `scale.parallel.companions`, which also reads
        them back in place after `load_state_dict`."""
        lists: dict[str, Sequence[Tensor]] = {"looks.previous": self.previous}
        for name, direction in self._observers().items():
            lists |= {f"{name}.{key}": tensors for key, tensors in direction.tensors().items()}
        if self.carry is not None:
            lists |= {f"carry.{key}": tensors for key, tensors in self.carry.companions().items()}
        return {key: dict(zip(self.names, tensors, strict=True)) for key, tensors in lists.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "lr": self.lr,
            "fresh": self.fresh,
            "last": None if self.last is None else [self.last.step, pack_array(self.last.table_GC)],
            "directions": {name: d.state_dict() for name, d in self._observers().items()},
            "carry": self.carry.state_dict() if self.carry is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ScaleError if other directions were saved."""
        ours, saved = set(self._observers()), set(state["directions"])
        if ours != saved:
            raise ScaleError(
                f"the checkpoint holds the predict.directions {', '.join(sorted(saved))}, this run wants "
                f"{', '.join(sorted(ours))} (drift is always kept): go on with the same ones, or without prediction"
            )
        self.steps, self.lr, self.fresh = state["steps"], state["lr"], state["fresh"]
        self.last = None
        if state["last"] is not None:
            step, table = state["last"]
            self.last = GroupStats(step, unpack_array(table), self.sums.elements_G)
        for name, direction in self._observers().items():
            direction.load_state_dict(state["directions"][name])
        if self.carry is not None:
            self.carry.load_state_dict(state["carry"])


def _per_step(table_GC: np.ndarray, steps: int, lr: float) -> np.ndarray:
    """Products with the update as it was, per step, from those with the update at lr factor 1."""
    ratio = lr / steps if steps else 0.0
    table_GC[:, _ONE_U] *= ratio
    table_GC[:, _TWO_U] *= ratio**2
    return table_GC
