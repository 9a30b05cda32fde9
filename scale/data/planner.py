"""Which documents go into which step: a pure function of (seed, number of groups drawn), the same on every rank.

The planner works on document lengths alone, so it can run ahead of the workers that read tokens, and its state is a
few numbers and the rows that are packed but not drawn yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scale.data.packing import Row, Span, best_fit, concat, rejoin
from scale.errors import UsageError

WINDOW_ROWS = 256
"""Rows packed at a time (at least one step's worth, at most to the end of an epoch): more fill better. The rows of a
window are shuffled."""


@dataclass(frozen=True)
class Plan:
    """The rows of one step, `tokens` in all. `drawn` counts those drawn so far from each source, this step included."""

    rows: list[Row]
    seq_len: int
    tokens: int
    drawn: tuple[int, ...]


class Planner:
    """An endless stream of plans over several sources, mixed by weight in tokens.

    `lengths[i]` are the document lengths (tokens) of source i; `seq_len_of(n)` is the row length of the n-th group.
    Each epoch visits the documents of a source once, in a new seeded order. Raises UsageError for a source in which no
    document has two tokens.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        weights: Sequence[float],
        tokens_per_step: int,
        seq_len_of: Callable[[int], int],
        packing: str = "best-fit",
        seed: int = 0,
    ):
        self.lengths, self.weights, self.seed = lengths, weights, seed
        self.tokens_per_step, self.seq_len_of = tokens_per_step, seq_len_of
        self.pack = {"best-fit": best_fit, "concat": concat}[packing]
        if not all((n > 1).any() for n in lengths):
            raise UsageError("data: a source has no document of two or more tokens, so there is nothing to predict")
        self.positions = [int(np.maximum(n - 1, 0).sum()) for n in lengths]
        self.groups = 0
        self.windows = 0
        self.epoch = [0] * len(lengths)
        self.cursor = [0] * len(lengths)
        self.taken = [0] * len(lengths)  # positions moved into windows, decides the mix
        self.drawn = [0] * len(lengths)  # positions handed out
        self.pending: list[Row] = []
        self.pending_len = 0
        self._order: list[np.ndarray | None] = [None] * len(lengths)

    def next(self) -> Plan:
        """Plan one step."""
        seq_len = self.seq_len_of(self.groups)
        wanted = self.tokens_per_step // seq_len
        carried: list[Span] = []
        if seq_len != self.pending_len:
            carried, self.pending, self.pending_len = rejoin(self.pending), [], seq_len
        while len(self.pending) < wanted:
            self.pending = self.pending + self._window(carried, seq_len)
            carried = []
        rows, self.pending = self.pending[:wanted], self.pending[wanted:]
        before = sum(self.drawn)
        for row in rows:
            for span in row:
                self.drawn[span.source] += span.length
        self.groups += 1
        return Plan(rows, seq_len, sum(self.drawn) - before, tuple(self.drawn))

    def _window(self, carried: list[Span], seq_len: int) -> list[Row]:
        spans, positions = list(carried), sum(s.length for s in carried)
        wanted = max(self.tokens_per_step, WINDOW_ROWS * seq_len)
        while positions < wanted:
            source = self._furthest_behind()
            if spans and self._epoch_is_over(source) and self.positions[source] >= wanted / 16:
                break  # or a document would come twice in one window; tiny sources have to
            spans.append(self._next_document(source))
            positions += spans[-1].length
        rows = self.pack(spans, seq_len)
        rng = np.random.default_rng([self.seed, 1, self.windows])
        self.windows += 1
        return [rows[i] for i in rng.permutation(len(rows))]

    def _furthest_behind(self) -> int:
        """The source that has given least of its share so far."""
        return min(range(len(self.lengths)), key=lambda i: (self.taken[i] / self.weights[i], i))

    def _epoch_is_over(self, source: int) -> bool:
        return self.cursor[source] == len(self.lengths[source])

    def _next_document(self, source: int) -> Span:
        while True:
            order = self._order[source]
            if order is None:
                rng = np.random.default_rng([self.seed, 0, source, self.epoch[source]])
                self._order[source] = order = rng.permutation(len(self.lengths[source]))
            if self._epoch_is_over(source):
                self.cursor[source], self._order[source] = 0, None
                self.epoch[source] += 1
                continue
            doc = int(order[self.cursor[source]])
            self.cursor[source] += 1
            positions = int(self.lengths[source][doc]) - 1
            if positions > 0:  # a single token has nothing to predict
                self.taken[source] += positions
                return Span(source, doc, 0, positions)

    def snapshot(self) -> dict[str, Any]:
        """State now, cheap: lists that later calls replace but never change are shared."""
        return {
            "groups": self.groups,
            "windows": self.windows,
            "epoch": list(self.epoch),
            "cursor": list(self.cursor),
            "taken": list(self.taken),
            "drawn": list(self.drawn),
            "pending": self.pending,
            "pending_len": self.pending_len,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after `snapshot`, also one that went through JSON."""
        for name in ("groups", "windows", "pending_len"):
            setattr(self, name, state[name])
        for name in ("epoch", "cursor", "taken", "drawn"):
            setattr(self, name, list(state[name]))
        self.pending = [[Span(*span) for span in row] for row in state["pending"]]
        self._order = [None] * len(self.lengths)
