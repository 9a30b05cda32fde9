"""Moving the weights along a direction, and taking it back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from scale_kernels.delta.op import DeltaPlan
from torch import Tensor

from scale.predict.groups import KINDS, kind_of
from scale.predict.weights.runs import runs
from scale.protocols import Shards, Strategy


class Jump:
    """Changes the fp32 masters of a strategy. Every call is a whole edit, after which forward passes see its result.

    All are collective. The snapshot takes memory once, at the first one.
    """

    def __init__(self, strategy: Strategy, offload: bool = False):
        """`offload`: the snapshot lies in CPU memory."""
        self.strategy, self.offload = strategy, offload
        self._snapshot: list[Tensor] = []
        self._plan: DeltaPlan | None = None

    def snapshot(self) -> None:
        """Remember the weights as they are."""
        with self._params() as (_, params):
            if not self._snapshot:
                self._snapshot = [self._room(param) for param in params]
            torch._foreach_copy_(self._snapshot, params)

    def _room(self, param: Tensor) -> Tensor:
        if not self.offload or param.device.type == "cpu":
            return torch.empty_like(param)
        return torch.empty_like(param, device="cpu", pin_memory=True)

    def apply(self, vectors: Sequence[Tensor], c_G: Sequence[float], seed: int) -> None:
        """Add c[kind] x vector: `c_G` in steps x lr factor for displacements per step at lr factor 1, as directions give.

        `seed` is read for bf16 masters only. Raises ValueError for coefficients that are not finite.
        """
        with self._params() as (shards, params):
            if self._plan is None:
                self._plan = DeltaPlan([kind_of(name) for name in shards], len(KINDS))
            c_1G = torch.tensor([list(c_G)], dtype=torch.float32, device=params[0].device)
            self._plan(params, [list(vectors)], c_1G, seed)

    def rollback(self) -> None:
        """The weights of the snapshot, bit for bit."""
        assert self._snapshot, "no snapshot was taken"
        with self._params() as (_, params):
            torch._foreach_copy_(params, self._snapshot)

    def kept(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The snapshot by parameter name: for checkpoints, and to be read back in place."""
        return dict(zip(names, self._snapshot, strict=True))

    def drift(self) -> float:
        """||weights - snapshot|| / ||snapshot||, the same on every rank."""
        assert self._snapshot, "no snapshot was taken"
        with self._params() as (shards, params):
            copies_N = torch.tensor([s.copies for s in shards.values()], dtype=torch.float64, device=params[0].device)
            squares_2 = torch.zeros(2, dtype=torch.float64, device=params[0].device)
            for run in runs(params):
                before = [x.to(p.device) for x, p in zip(self._snapshot[run], params[run], strict=True)]
                pair = (torch._foreach_sub(params[run], before), before)
                norms_2N = torch.stack([torch.stack(torch._foreach_norm(list(tensors))) for tensors in pair])
                squares_2 += (norms_2N.double().square() / copies_N[run]).sum(1)
            moved, whole = self.strategy.ranks.all_sum(squares_2).sqrt().tolist()
        return moved / whole if whole else math.inf

    @contextmanager
    def _params(self) -> Iterator[tuple[Shards, list[Tensor]]]:
        with self.strategy.edit_masters() as shards:
            yield shards, [shard.param.detach() for shard in shards.values()]
