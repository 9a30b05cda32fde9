"""Moving the weights along a direction, and taking it back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from scale_kernels.delta.op import DeltaPlan
from torch import Tensor

from scale.predict.kinds import KINDS, kind_of
from scale.predict.weights.runs import runs
from scale.protocols import Shards, Strategy
from scale.train.observe import layer_of

Place = tuple[str, str]
"""Kind and layer of weights."""


class Jump:
    """Changes the fp32 masters of a strategy. Every call is a whole edit, after which forward passes see its result.

    All are collective. The snapshot takes memory once, at the first one.
    """

    def __init__(self, strategy: Strategy):
        self.strategy = strategy
        self._snapshot: list[Tensor] = []
        self._landed: list[Tensor] = []
        self._plan: DeltaPlan | None = None
        with strategy.edit_masters() as shards:
            place_N = [(KINDS[kind_of(name)], layer_of(name)) for name in shards]
        self.places: list[Place] = list(dict.fromkeys(place_N))
        """What may be moved by a factor of its own."""
        self._place_N = [self.places.index(place) for place in place_N]

    def snapshot(self) -> None:
        """Remember the weights as they are."""
        with self._params() as (_, params):
            if not self._snapshot:
                self._snapshot = [torch.empty_like(param) for param in params]
            torch._foreach_copy_(self._snapshot, params)

    def apply(
        self, vectors: Sequence[Tensor], c_G: Sequence[float], seed: int, factor_P: Sequence[float] | None = None
    ) -> None:
        """Add c[kind] x vector: `c_G` in steps x lr factor for displacements per step at lr factor 1, as directions give.

        `factor_P`: by what the coefficient of each place is multiplied. `seed` is read for bf16 masters only. Raises
        ValueError for coefficients that are not finite.
        """
        factors = [1.0] * len(self.places) if factor_P is None else factor_P
        c_P = [c_G[KINDS.index(kind)] * factor for (kind, _), factor in zip(self.places, factors, strict=True)]
        with self._params() as (_, params):
            if self._plan is None:
                self._plan = DeltaPlan(self._place_N, len(self.places))
            self._plan(params, [list(vectors)], torch.tensor([c_P], device=params[0].device), seed)

    def land(self) -> None:
        """Remember where the jump led."""
        with self._params() as (_, params):
            if not self._landed:
                self._landed = [torch.empty_like(param) for param in params]
            torch._foreach_copy_(self._landed, params)

    def stayed_P(self) -> list[float]:
        """What became of the jump since: <weights - snapshot, landed - snapshot> / |landed - snapshot|^2 at each place, the
        same on every rank. 1: it stayed; more: training carried on; less: training took it back; nan: nothing moved."""
        assert self._snapshot and self._landed, "no jump was made"
        with self._params() as (shards, params):
            copies_N = torch.tensor([s.copies for s in shards.values()], dtype=torch.float64)
            sums_NS: list[Tensor] = []
            for run in runs(params):
                before = self._snapshot[run]
                jump = torch._foreach_sub(self._landed[run], before)
                dot = torch._foreach_mul(torch._foreach_sub(params[run], before), jump)
                square = torch._foreach_mul(jump, jump)
                sums_NS += [torch.stack([d.double().sum(), q.double().sum()]) for d, q in zip(dot, square, strict=True)]
            here_NS = torch.stack(sums_NS).cpu() / copies_N[:, None]
            sums_PS = torch.zeros(len(self.places), 2, dtype=torch.float64)
            sums_PS.index_add_(0, torch.tensor(self._place_N), here_NS)
            dot_P, square_P = self.strategy.ranks.all_sum(sums_PS).unbind(1)
        found: list[float] = torch.where(square_P > 0, dot_P / square_P, math.nan).tolist()
        return found

    def rollback(self) -> None:
        """The weights of the snapshot, bit for bit."""
        assert self._snapshot, "no snapshot was taken"
        with self._params() as (_, params):
            torch._foreach_copy_(params, self._snapshot)

    def tensors(self, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Snapshot and landing, those that there are, by parameter name: auxiliary sharded state, read back in place."""
        kept = {"jump.snapshot": self._snapshot, "jump.landed": self._landed}
        return {key: dict(zip(names, tensors, strict=True)) for key, tensors in kept.items() if tensors}

    def drift(self) -> float:
        """||weights - snapshot|| / ||snapshot||, the same on every rank."""
        assert self._snapshot, "no snapshot was taken"
        with self._params() as (shards, params):
            copies_N = torch.tensor([s.copies for s in shards.values()], dtype=torch.float64, device=params[0].device)
            squares_2 = torch.zeros(2, dtype=torch.float64, device=params[0].device)
            for run in runs(params):
                before = self._snapshot[run]
                pair = (torch._foreach_sub(params[run], before), before)
                norms_2N = torch.stack([torch.stack(torch._foreach_norm(list(tensors))) for tensors in pair])
                squares_2 += (norms_2N.double().square() / copies_N[run]).sum(1)
            moved, whole = self.strategy.ranks.all_sum(squares_2).sqrt().tolist()
        return moved / whole if whole else math.inf

    @contextmanager
    def _params(self) -> Iterator[tuple[Shards, list[Tensor]]]:
        with self.strategy.edit_masters() as shards:
            yield shards, [shard.param.detach() for shard in shards.values()]
