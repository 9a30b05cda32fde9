"""The accumulated update of each matrix, reduced to its dominant directions.

Updates of a long stretch of training lie mostly in few singular directions, which persist, while the rest is noise
(arXiv 1812.04754 for the gradient; for updates of fine-tuning arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scale.errors import UsageError
from scale.parallel.ranks import Ranks
from scale.predict.weights.directions.kept import Numbers, like, zero
from scale.protocols import Shards

RANK = 2
ITERATIONS = 8
LEAST_LOOKS, MOST_LOOKS = 10, 100
"""After an anchor: before it says something, and before the next anchor."""
_TINY = 1e-30


class Singular(Numbers):
    """Displacement since an anchor per time; matrices projected on their first two right singular vectors, found by
    subspace iteration with A^T (A V) summed over ranks. Vectors and stacks of matrices stay as they are."""

    name = "singular"
    copies = 1
    NUMBERS = ("looks", "time")

    def __init__(self, shards: Shards, ranks: Ranks) -> None:
        if any(shard.flat for shard in shards.values()):
            raise UsageError(
                "predict.directions names 'singular': strategy deepspeed cuts parameters into flat parts, which hold no "
                "matrices (leave it out, or use strategy fsdp)"
            )
        self.ranks = ranks
        self.moved = like(shards)
        self.widths = {n: s.global_shape[1] for n, s in enumerate(shards.values()) if len(s.global_shape) == 2}
        self.looks, self.time = 0, 0.0

    def observe(self, params: Sequence[Tensor], update: Sequence[Tensor] | None, steps: int, lr: float) -> None:
        if update is None or self.looks == MOST_LOOKS:
            self.restart()
        if update is not None:
            torch._foreach_add_(self.moved, list(update), alpha=lr)
            self.looks, self.time = self.looks + 1, self.time + lr

    def restart(self) -> None:
        """Here is the anchor."""
        zero([self.moved])
        self.looks, self.time = 0, 0.0

    def vectors(self) -> list[Tensor] | None:
        if self.looks < LEAST_LOOKS:
            return None
        out = list(torch._foreach_mul(self.moved, 1 / self.time))
        if self.widths:
            matrices = [out[n] for n in self.widths]
            for n, A_RC, V_CK in zip(self.widths, matrices, self._dominant(matrices), strict=True):
                out[n] = (A_RC @ V_CK) @ V_CK.T
        return out

    def _dominant(self, matrices: list[Tensor]) -> list[Tensor]:
        """(C, K) orthonormal right singular vectors of matrices whose rows lie on all ranks. Collective."""
        found = [_start(A_RC) for A_RC in matrices]
        for _ in range(ITERATIONS):
            images = [A_RC.T @ (A_RC @ V_CK) for A_RC, V_CK in zip(matrices, found, strict=True)]
            whole = self.ranks.all_sum(torch.cat([image.flatten() for image in images]))
            parts = whole.split([image.numel() for image in images])
            found = [_orthonormal(part.view_as(V_CK)) for part, V_CK in zip(parts, found, strict=True)]
        return found

    def tensors(self) -> dict[str, Sequence[Tensor]]:
        return {"moved": self.moved}


def _start(A_RC: Tensor) -> Tensor:
    """(C, K): the same on every rank, and along no axis or constant."""
    rng = torch.Generator().manual_seed(A_RC.shape[1])
    return torch.randn(A_RC.shape[1], RANK, generator=rng).to(A_RC.device)


def _orthonormal(V_CK: Tensor) -> Tensor:
    """Gram-Schmidt, twice against rounding; columns without anything new become (nearly) 0."""
    columns: list[Tensor] = []
    for column_C in V_CK.unbind(1):
        before = column_C.norm()
        for _ in range(2):
            for other_C in columns:
                column_C = column_C - other_C * (other_C @ column_C)
        rest = column_C.norm()
        columns.append(torch.where(rest > 1e-6 * before, column_C / (rest + _TINY), 0.0))
    return torch.stack(columns, 1)
