"""Which documents go into which step: a pure function of (seed, number of groups drawn), the same on every rank.

The planner works on document lengths alone, so it can run ahead of the workers that read tokens, and its state is a
few numbers and the rows that are packed but not drawn yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scale.data.order import EpochOrder
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

    `lengths[i]` are the document lengths (tokens) of source i; `seq_len_of(n)` is the row length of the n-th group,
    at most `longest`. Each epoch visits the pieces (`longest` positions at most) of a source's documents once, in a new
    seeded order. Raises UsageError for a source in which no document has two tokens.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        weights: Sequence[float],
        tokens_per_step: int,
        seq_len_of: Callable[[int], int],
        longest: int,
        packing: str = "best-fit",
        seed: int = 0,
    ):
        self.lengths, self.weights, self.seed = lengths, weights, seed
        self.tokens_per_step, self.seq_len_of, self.longest = tokens_per_step, seq_len_of, longest
        self.packing, self.pack = packing, {"best-fit": best_fit, "concat": concat}[packing]
        self.orders = [EpochOrder(i, n, longest, seed) for i, n in enumerate(lengths)]
        if not all(order.size for order in self.orders):
            raise UsageError("data: a source has no document of two or more tokens, so there is nothing to predict")
        self.groups = 0
        self.windows = 0
        self.epoch = [0] * len(lengths)
        self.cursor = [0] * len(lengths)
        self.taken = [0] * len(lengths)  # positions moved into windows, decides the mix
        self.drawn = [0] * len(lengths)  # positions handed out
        self.pending: list[Row] = []
        self.pending_len = 0

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

    def fill(self, groups: int = 4) -> float:
        """Share of positions that are not padding, in rows of `longest`: counted over the whole windows that the first
        `groups` steps of an own planner would open. Changes nothing here."""
        own = Planner(
            self.lengths,
            self.weights,
            self.tokens_per_step,
            lambda _: self.longest,
            self.longest,
            self.packing,
            self.seed,
        )
        rows: list[Row] = []
        while len(rows) * self.longest < groups * self.tokens_per_step:
            rows += own._window([], self.longest)
        return sum(span.length for row in rows for span in row) / (len(rows) * self.longest)

    def _window(self, carried: list[Span], seq_len: int) -> list[Row]:
        spans, positions = list(carried), sum(s.length for s in carried)
        wanted = max(self.tokens_per_step, WINDOW_ROWS * seq_len)
        while positions < wanted:
            source = self._furthest_behind()
            if spans and self._epoch_is_over(source) and self.orders[source].positions >= wanted / 16:
                break  # or a piece would come twice in one window; tiny sources have to
            spans.append(self._next_piece(source))
            positions += spans[-1].length
        rows = self.pack(spans, seq_len)
        rng = np.random.default_rng([self.seed, 1, self.windows])
        self.windows += 1
        return [rows[i] for i in rng.permutation(len(rows))]

    def _furthest_behind(self) -> int:
        """The source that has given least of its share so far."""
        return min(range(len(self.lengths)), key=lambda i: (self.taken[i] / self.weights[i], i))

    def _epoch_is_over(self, source: int) -> bool:
        return self.cursor[source] == self.orders[source].size

    def _next_piece(self, source: int) -> Span:
        if self._epoch_is_over(source):
            self.cursor[source] = 0
            self.epoch[source] += 1
        span = self.orders[source].span(self.epoch[source], self.cursor[source])
        self.cursor[source] += 1
        self.taken[source] += span.length
        return span

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
