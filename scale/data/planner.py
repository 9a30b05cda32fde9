"""Which documents go into which step: a pure function of (seed, number of groups drawn), the same on every rank.

The planner works on document lengths alone, so it can run ahead of the workers that read tokens, and its state is a
few numbers and the rows that are packed but not drawn yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scale.data.order import EpochOrder
from scale.data.packing import Row, Span, best_fit, concat, rejoin
from scale.data.selection import Budget, Selector, best, inclusion, pack_weighted, rejoin_weighted, systematic
from scale.errors import UsageError

WINDOW_ROWS = 256
"""Rows packed at a time (at least one step's worth, at most to the end of an epoch): more fill better. The rows of a
window are shuffled."""


@dataclass(frozen=True)
class Plan:
    """The rows of one step, `tokens` in all: the `number`-th since the run began, from 0. `drawn` counts those drawn so far
    from each source, this step included. `weights` of the spans in the loss: only under an unbiased selector."""

    rows: list[Row]
    seq_len: int
    tokens: int
    drawn: tuple[int, ...]
    number: int
    weights: list[list[float]] = field(default_factory=list)


class Planner:
    """An endless stream of plans over several sources, mixed by weight in tokens.

    `lengths[i]` are the document lengths (tokens) of source i; `seq_len_of(n)` is the row length of the n-th group,
    at most `longest`. Each epoch visits the pieces (`longest` positions at most) of a source's documents once, in a new
    seeded order. Raises UsageError for a source in which no document has two tokens.

    A `selector` looks at 1 / keep times as many pieces and leaves those out that teach least: in each source the same
    share, so that the mix stays. Pieces left out come again in the next epoch. Another share (after a warm-up) holds for
    windows opened from then on.
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
        self.selector: Selector | None = None
        self.groups = 0
        self.windows = 0
        self.epoch = [0] * len(lengths)
        self.cursor = [0] * len(lengths)
        self.taken = [0] * len(lengths)  # positions moved into windows, decides the mix
        self.drawn = [0] * len(lengths)  # positions handed out
        self.kept = [0] * len(lengths)  # positions that the selector chose
        self.passed_over = [0] * len(lengths)  # pieces that it did not
        self.budget = Budget(len(lengths))
        self.pending: list[Row] = []
        self.pending_weights: list[list[float]] = []  # of the spans of pending; none unless selection is unbiased
        self.pending_len = 0

    @property
    def documents(self) -> list[np.ndarray]:
        """Of each source, the pieces up to and including each document."""
        return [order.last for order in self.orders]

    def next(self) -> Plan:
        """Plan one step."""
        seq_len = self.seq_len_of(self.groups)
        wanted = self.tokens_per_step // seq_len
        carried: tuple[list[Span], list[float]] = ([], [])
        if seq_len != self.pending_len:
            if self.pending_weights:
                carried = rejoin_weighted(self.pending, self.pending_weights)
            else:
                carried = (rejoin(self.pending), [])
            self.pending, self.pending_weights, self.pending_len = [], [], seq_len
        while len(self.pending) < wanted:
            opened, opened_weights = self._window(*carried, seq_len)
            self.pending, self.pending_weights = self.pending + opened, self.pending_weights + opened_weights
            carried = ([], [])
        rows, self.pending = self.pending[:wanted], self.pending[wanted:]
        weights, self.pending_weights = self.pending_weights[:wanted], self.pending_weights[wanted:]
        before = sum(self.drawn)
        for row in rows:
            for span in row:
                self.drawn[span.source] += span.length
        self.groups += 1
        return Plan(rows, seq_len, sum(self.drawn) - before, tuple(self.drawn), self.groups - 1, weights)

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
            rows += own._window([], [], self.longest)[0]
        return sum(span.length for row in rows for span in row) / (len(rows) * self.longest)

    def _window(self, carried: list[Span], weights: list[float], seq_len: int) -> tuple[list[Row], list[list[float]]]:
        wanted = max(self.tokens_per_step, WINDOW_ROWS * seq_len)
        keep = 1.0 if self.selector is None else self.selector.keep(self.groups)
        if keep != self.budget.keep:
            self.budget.change(keep, self.taken)
        candidates = self._candidates(wanted - sum(s.length for s in carried), wanted, bool(carried))
        rng = np.random.default_rng([self.seed, 1, self.windows])
        self.windows += 1
        if self.selector is None:
            rows = self.pack([*carried, *candidates], seq_len)
            return [rows[i] for i in rng.permutation(len(rows))], []
        chosen, their_weights = self._chosen(self.selector, candidates)
        if not self.selector.unbiased:
            rows = self.pack([*carried, *chosen], seq_len)
            return [rows[i] for i in rng.permutation(len(rows))], []
        rows, row_weights = pack_weighted(self.pack, [*carried, *chosen], [*weights, *their_weights], seq_len)
        order = rng.permutation(len(rows))
        return [rows[i] for i in order], [row_weights[i] for i in order]

    def _candidates(self, room: int, wanted: int, carried: bool) -> list[Span]:
        """The next pieces, which fill the `room` left in a window of `wanted` positions once a selector has chosen."""
        keep = self.budget.keep
        spans: list[Span] = []
        positions = 0
        while positions < room / keep:
            source = self._furthest_behind()
            if (
                (carried or spans)
                and self._epoch_is_over(source)
                and self.orders[source].positions >= wanted / keep / 16
            ):
                break  # or a piece would come twice in one window; tiny sources have to
            spans.append(self._next_piece(source))
            positions += spans[-1].length
        return spans

    def _chosen(self, selector: Selector, candidates: list[Span]) -> tuple[list[Span], list[float]]:
        """The pieces worth training on, of each source its share, and the weight of each in the loss.

        The best are taken up to the budget. A weight is share / probability: the sum of weighted losses then has the mean of
        a sum over the share of pieces drawn blindly.
        """
        keep = self.budget.keep
        source_N = np.array([span.source for span in candidates], dtype=np.int64)
        length_N = np.array([span.length for span in candidates], dtype=np.int64)
        weight_N = np.zeros(len(candidates))
        score_N = np.zeros(len(candidates))
        if keep < 1:
            score_N = selector.scores(self.groups, candidates, self.pieces(candidates))
        rng = np.random.default_rng([self.seed, 2, self.windows])
        for source in np.unique(source_N).tolist():
            mine = np.flatnonzero(source_N == source)
            if selector.unbiased:
                chance = inclusion(score_N[mine], length_N[mine], keep)
                picked = systematic(chance, rng.random())
                weight_N[mine[picked]] = keep / chance[picked]
            else:
                room = self.budget.allowed(source, self.taken[source]) - self.kept[source]
                picked = best(score_N[mine], length_N[mine], room)
                weight_N[mine[picked]] = 1.0
            self.kept[source] += int(length_N[mine[picked]].sum())
            self.passed_over[source] += len(mine) - len(picked)
        chosen = np.flatnonzero(weight_N)
        return [candidates[i] for i in chosen], weight_N[chosen].tolist()

    def pieces(self, spans: Sequence[Span]) -> np.ndarray:
        """(N,) number of the piece in which each span starts, counted through all sources."""
        source_N, doc_N, start_N, _ = np.array(spans, dtype=np.int64).reshape(-1, 4).T
        piece_N = np.zeros(len(spans), dtype=np.int64)
        first = 0
        for order in self.orders:
            mine = source_N == order.source
            piece_N[mine] = first + order.pieces(doc_N[mine], start_N[mine])
            first += order.size
        return piece_N

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
        selected = {
            "kept": list(self.kept),
            "passed_over": list(self.passed_over),
            "weights": self.pending_weights,
            "budget": self.budget.state_dict(),
        }
        return {
            "groups": self.groups,
            "windows": self.windows,
            "epoch": list(self.epoch),
            "cursor": list(self.cursor),
            "taken": list(self.taken),
            "drawn": list(self.drawn),
            "pending": self.pending,
            "pending_len": self.pending_len,
            **({} if self.selector is None else selected),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after `snapshot`, also one that went through JSON."""
        for name in ("groups", "windows", "pending_len"):
            setattr(self, name, state[name])
        for name in ("epoch", "cursor", "taken", "drawn"):
            setattr(self, name, list(state[name]))
        self.pending = [[Span(*span) for span in row] for row in state["pending"]]
        if self.selector is not None:
            self.kept, self.passed_over = list(state["kept"]), list(state["passed_over"])
            self.pending_weights = state["weights"]
            self.budget.load_state_dict(state["budget"])
