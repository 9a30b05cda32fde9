"""What is remembered of every piece of the training data.

P pieces of all sources, N of them at a time, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scale.predict.packing import pack_array, unpack_array

_ARRAYS = ("loss_P", "level_P", "group_P", "visits_P")
_FAST, _SLOW = 0.8, 0.95
"""Memory of the loss level over groups: their difference is its trend."""


class LossHistory:
    """Losses of pieces as they were heard, 14 bytes a piece; its state holds the pieces that were seen.

    `loss_P` (nan: unseen) forgets with `memory`: new = memory x old + (1 - memory) x heard; `level_P` is the level of all
    losses, remembered in the same way at the same moments, so that their difference tells how hard a piece is among
    others. `group_P` is the group at which it was last heard of, `visits_P` how often. `source_S` and `level` are averages
    of heard losses (nan at first), `trend` is how the level moves.
    """

    def __init__(self, sizes: Sequence[int], memory: float):
        self.memory = memory
        self.last_S = np.cumsum(sizes)
        total = int(sum(sizes))
        self.loss_P, self.level_P = np.full((2, total), np.nan, dtype=np.float32)
        self.group_P = np.full(total, -1, dtype=np.int32)
        self.visits_P = np.zeros(total, dtype=np.uint16)
        self.source_S = np.full(len(sizes), np.nan)
        self.fast = self.slow = float("nan")

    @property
    def level(self) -> float:
        return self.fast

    @property
    def trend(self) -> float:
        """Fast average less slow average: negative while losses fall."""
        return self.fast - self.slow

    def source_of(self, pieces_N: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.last_S, pieces_N, side="right")

    def update(self, group: int, pieces_N: np.ndarray, losses_N: np.ndarray) -> None:
        """Remember mean losses of pieces (each named once) that were heard at `group`."""
        if not len(pieces_N):
            return
        mean = float(losses_N.mean())
        self.fast, self.slow = _blend(self.fast, mean, _FAST), _blend(self.slow, mean, _SLOW)
        source_N = self.source_of(pieces_N)
        for source in np.unique(source_N):
            self.source_S[source] = _blend(self.source_S[source], float(losses_N[source_N == source].mean()), _FAST)
        for array_P, new_N in ((self.loss_P, losses_N), (self.level_P, np.full(len(losses_N), self.level))):
            old_N = array_P[pieces_N].astype(np.float64)
            array_P[pieces_N] = np.where(np.isnan(old_N), new_N, self.memory * old_N + (1 - self.memory) * new_N)
        self.group_P[pieces_N] = group
        self.visits_P[pieces_N] = np.minimum(self.visits_P[pieces_N].astype(np.int64) + 1, 2**16 - 1)

    def state_dict(self) -> dict[str, Any]:
        seen_P = self.visits_P > 0
        return {
            "seen": pack_array(np.packbits(seen_P)),
            **{name: pack_array(getattr(self, name)[seen_P]) for name in _ARRAYS},
            "levels": pack_array(np.array([self.fast, self.slow, *self.source_S])),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        seen_P = np.unpackbits(unpack_array(state["seen"]), count=len(self.loss_P)).astype(bool)
        self.loss_P[:], self.level_P[:], self.group_P[:], self.visits_P[:] = np.nan, np.nan, -1, 0
        for name in _ARRAYS:
            getattr(self, name)[seen_P] = unpack_array(state[name])
        levels = unpack_array(state["levels"])
        self.fast, self.slow, self.source_S = float(levels[0]), float(levels[1]), levels[2:]


def _blend(old: float, new: float, memory: float) -> float:
    return new if np.isnan(old) else memory * old + (1 - memory) * new
