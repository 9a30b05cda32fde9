"""What is remembered of every piece of the training data, and of its neighbourhood.

P pieces of all sources, N of them at a time, Q passages, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scale.predict.packing import pack_array, unpack_array

_ARRAYS = ("loss_P", "level_P", "group_P", "visits_P")
_PASSAGES = ("loss_Q", "extra_Q", "visits_Q")
MOST = 2**16 - 1
"""Visits are not counted further."""
_FAST, _SLOW = 0.8, 0.95
"""Memory of the loss level over groups: their difference is its trend."""
PASSAGE = 16
"""Neighbouring pieces of a document that are remembered together as well: what was heard of one tells of the others long
before they come up themselves."""


class Passages:
    """The passage of each piece. `last[s]`: pieces up to and including each document of source s."""

    def __init__(self, last: Sequence[np.ndarray]):
        self.last = last
        self.sizes = [int(last_D[-1]) if len(last_D) else 0 for last_D in last]
        self.before_S = np.cumsum([0, *self.sizes])
        counts = [-(-np.diff(last_D, prepend=0) // PASSAGE) for last_D in last]
        ends = np.cumsum([0, *(int(count_D.sum()) for count_D in counts)])
        self.first = [end + np.cumsum(count_D) - count_D for end, count_D in zip(ends[:-1], counts, strict=True)]
        self.count = int(ends[-1])

    def source_of(self, pieces_N: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.before_S[1:], pieces_N, side="right")

    def of(self, pieces_N: np.ndarray) -> np.ndarray:
        """(N,) passages of pieces that are counted through all sources."""
        passage_N = np.zeros(len(pieces_N), dtype=np.int64)
        source_N = self.source_of(pieces_N)
        for source in np.unique(source_N).tolist():
            mine_N = source_N == source
            place_N = pieces_N[mine_N] - self.before_S[source]
            last_D = self.last[source]
            doc_N = np.searchsorted(last_D, place_N, side="right")
            start_N = np.where(doc_N > 0, last_D[doc_N - 1], 0)
            passage_N[mine_N] = self.first[source][doc_N] + (place_N - start_N) // PASSAGE
        return passage_N


class LossHistory:
    """Losses of pieces as they were heard, 14 bytes a piece, and of passages; its state holds those that were seen.

    `loss_P` (nan: unseen) forgets with `memory`: new = memory x old + (1 - memory) x heard; `level_P` is the level of all
    losses, remembered in the same way at the same moments, so that their difference tells how hard a piece is among
    others. `group_P` is the group at which it was last heard of, `visits_P` how often. `loss_Q` forgets with `memory` as
    well; `extra_Q` is how much higher than the level the losses of a passage were in the mean, `visits_Q` of how many
    pieces. `source_S` and `level` are averages of heard losses (nan at first), `trend` is how the level moves.
    """

    def __init__(self, passages: Passages, memory: float):
        self.memory, self.passages = memory, passages
        total = sum(passages.sizes)
        self.loss_P, self.level_P = np.full((2, total), np.nan, dtype=np.float32)
        self.group_P = np.full(total, -1, dtype=np.int32)
        self.visits_P = np.zeros(total, dtype=np.uint16)
        self.loss_Q = np.full(passages.count, np.nan, dtype=np.float32)
        self.extra_Q = np.zeros(passages.count, dtype=np.float32)
        self.visits_Q = np.zeros(passages.count, dtype=np.uint16)
        self.source_S = np.full(len(passages.sizes), np.nan)
        self.fast = self.slow = float("nan")

    @property
    def level(self) -> float:
        return self.fast

    @property
    def trend(self) -> float:
        """Fast average less slow average: negative while losses fall."""
        return self.fast - self.slow

    def update(self, group: int, pieces_N: np.ndarray, losses_N: np.ndarray) -> None:
        """Remember mean losses of pieces (each named once) that were heard at `group`."""
        if not len(pieces_N):
            return
        mean = float(losses_N.mean())
        self.fast, self.slow = _blend(self.fast, mean, _FAST), _blend(self.slow, mean, _SLOW)
        source_N = self.passages.source_of(pieces_N)
        for source in np.unique(source_N):
            self.source_S[source] = _blend(self.source_S[source], float(losses_N[source_N == source].mean()), _FAST)
        for array_P, new_N in ((self.loss_P, losses_N), (self.level_P, np.full(len(losses_N), self.level))):
            old_N = array_P[pieces_N].astype(np.float64)
            array_P[pieces_N] = np.where(np.isnan(old_N), new_N, self.memory * old_N + (1 - self.memory) * new_N)
        self.group_P[pieces_N] = group
        self.visits_P[pieces_N] = np.minimum(self.visits_P[pieces_N].astype(np.int64) + 1, MOST)
        self._passages(self.passages.of(pieces_N), losses_N)

    def _passages(self, passages_N: np.ndarray, losses_N: np.ndarray) -> None:
        """Remember what the pieces say of the passages that hold them."""
        passages_U, inverse_N, count_U = np.unique(passages_N, return_inverse=True, return_counts=True)
        mean_U = np.bincount(inverse_N, losses_N) / count_U
        old_U = self.loss_Q[passages_U].astype(np.float64)
        self.loss_Q[passages_U] = np.where(np.isnan(old_U), mean_U, self.memory * old_U + (1 - self.memory) * mean_U)
        visits_U = np.minimum(self.visits_Q[passages_U].astype(np.int64) + count_U, MOST)
        extra_U = self.extra_Q[passages_U].astype(np.float64)
        self.extra_Q[passages_U] = extra_U + (mean_U - self.level - extra_U) * count_U / visits_U
        self.visits_Q[passages_U] = visits_U

    def state_dict(self) -> dict[str, Any]:
        seen_P, seen_Q = self.visits_P > 0, self.visits_Q > 0
        return {
            "seen": pack_array(np.packbits(seen_P)),
            **{name: pack_array(getattr(self, name)[seen_P]) for name in _ARRAYS},
            "seen_passages": pack_array(np.packbits(seen_Q)),
            **{name: pack_array(getattr(self, name)[seen_Q]) for name in _PASSAGES},
            "levels": pack_array(np.array([self.fast, self.slow, *self.source_S])),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        seen_P = np.unpackbits(unpack_array(state["seen"]), count=len(self.loss_P)).astype(bool)
        self.loss_P[:], self.level_P[:], self.group_P[:], self.visits_P[:] = np.nan, np.nan, -1, 0
        seen_Q = np.unpackbits(unpack_array(state["seen_passages"]), count=len(self.loss_Q)).astype(bool)
        self.loss_Q[:], self.extra_Q[:], self.visits_Q[:] = np.nan, 0, 0
        for names, seen in ((_ARRAYS, seen_P), (_PASSAGES, seen_Q)):
            for name in names:
                getattr(self, name)[seen] = unpack_array(state[name])
        levels = unpack_array(state["levels"])
        self.fast, self.slow, self.source_S = float(levels[0]), float(levels[1]), levels[2:]


def _blend(old: float, new: float, memory: float) -> float:
    return new if np.isnan(old) else memory * old + (1 - memory) * new
