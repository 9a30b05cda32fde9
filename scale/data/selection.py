"""Which pieces of a window are trained on: what the planner asks of a selector, and how the answer becomes rows.

N candidates of a window. A piece is a run of at most `longest` positions of a document (`scale.data.order`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from scale.data.packing import Row, Span, rejoin

LAG = 9
"""A window opened for group n knows losses that were heard when group n - LAG or an earlier one was the last one drawn.
Workers run at most two groups each ahead, so up to four of them never plan before what a window may know was heard: what
it knows is a function of n alone."""
FLOOR = 0.2
"""Share of a piece's probability that does not follow its score. Weights thus stay below 1 / FLOOR."""


class Selector(Protocol):
    """Foresees what pieces are worth.

    Windows come in the order of their groups. What it answers is a function of (what was heard and decided by group - LAG,
    arguments).
    """

    probed: dict[str, int]
    """documents, tokens and forwards of the forward passes it asked for so far."""
    unbiased: bool

    def keep(self, group: int) -> float:
        """Share of the candidates (in positions) of a window opened for `group` that is trained on. At 1 no score is asked
        for."""
        ...

    def scores(self, group: int, spans: Sequence[Span], pieces_N: np.ndarray) -> np.ndarray:
        """(N,) worth of the candidates of a window opened for `group`, the numbers of whose pieces are `pieces_N`: the
        highest first, +inf before all, never nan."""
        ...

    def hear(self, group: int, pieces_N: np.ndarray, losses_N: np.ndarray) -> None:
        """Mean loss of some pieces, each named once, heard when `group` was the last one drawn."""
        ...

    def state_dict(self, drawn: int) -> dict[str, Any]:
        """What planning needs after group `drawn` (-1: none), however far plans were made ahead. JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Budget:
    """How many positions of each source may be trained on: the share of all that was looked at, each window by the share that
    held when it was opened, so that what one window takes too much the next one takes less.

    `keep` is the present share, `due_S` what earlier ones allowed, of the first `since_S` positions.
    """

    def __init__(self, sources: int):
        self.keep, self.due_S, self.since_S = 1.0, [0.0] * sources, [0] * sources

    def change(self, keep: float, taken_S: Sequence[int]) -> None:
        """Another share for the positions after the first `taken_S`."""
        self.due_S = [self.allowed(source, taken) for source, taken in enumerate(taken_S)]
        self.keep, self.since_S = keep, list(taken_S)

    def allowed(self, source: int, taken: int) -> float:
        """Of the first `taken` positions."""
        return self.due_S[source] + self.keep * (taken - self.since_S[source])

    def state_dict(self) -> dict[str, Any]:
        return {"keep": self.keep, "due": list(self.due_S), "since": list(self.since_S)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.keep, self.due_S, self.since_S = state["keep"], list(state["due"]), list(state["since"])


def best(scores_N: np.ndarray, lengths_N: np.ndarray, budget: float) -> np.ndarray:
    """Indices (ascending) of the highest scores whose lengths together reach `budget`; the earlier one of equals."""
    order = np.argsort(-scores_N, kind="stable")
    before = np.cumsum(lengths_N[order]) - lengths_N[order]
    return np.sort(order[before < budget])


def inclusion(scores_N: np.ndarray, lengths_N: np.ndarray, keep: float) -> np.ndarray:
    """(N,) probabilities, proportional to FLOOR + (1 - FLOOR) score / mean score and at most 1, so that the expected
    share of the positions is `keep`. Scores of +inf count as the highest finite one, negative ones as 0."""
    finite = scores_N[np.isfinite(scores_N)]
    size_N = np.clip(np.where(np.isfinite(scores_N), scores_N, finite.max(initial=0.0)), 0.0, None)
    mean = float(np.average(size_N, weights=lengths_N))
    size_N = FLOOR + (1 - FLOOR) * size_N / mean if mean > 0 else np.ones(len(scores_N))
    certain_N = np.zeros(len(size_N), dtype=bool)
    while True:
        room = keep * lengths_N.sum() - lengths_N[certain_N].sum()
        scale = room / max(float((size_N * lengths_N)[~certain_N].sum()), 1e-300)
        over_N = ~certain_N & (scale * size_N > 1)
        if not over_N.any():
            return np.where(certain_N, 1.0, scale * size_N)
        certain_N |= over_N


def systematic(probabilities_N: np.ndarray, start: float) -> np.ndarray:
    """Indices (ascending) of a sample in which i is with probability `probabilities_N[i]`, for `start` uniform in [0, 1).

    Systematic sampling (Madow, "On the Theory of Systematic Sampling, II", 1949): exact probabilities, and a sample
    size that varies by less than one.
    """
    counts = np.ceil(np.cumsum(probabilities_N) - start)
    return np.flatnonzero(np.diff(counts, prepend=0.0) > 0)


def pack_weighted(
    pack: Callable[[Iterable[Span], int], list[Row]], spans: Sequence[Span], weights: Sequence[float], seq_len: int
) -> tuple[list[Row], list[list[float]]]:
    """`pack`, with the weight of each packed span beside its row."""
    packed = pack([span._replace(source=i) for i, span in enumerate(spans)], seq_len)
    rows = [[span._replace(source=spans[span.source].source) for span in row] for row in packed]
    return rows, [[weights[span.source] for span in row] for row in packed]


def rejoin_weighted(rows: Sequence[Row], weights: Sequence[Sequence[float]]) -> tuple[list[Span], list[float]]:
    """`rejoin`, where only neighbours of equal weight are joined."""
    names = sorted({(s.source, w) for row, ws in zip(rows, weights, strict=True) for s, w in zip(row, ws, strict=True)})
    number = {name: i for i, name in enumerate(names)}
    tagged = [
        [span._replace(source=number[span.source, weight]) for span, weight in zip(row, ws, strict=True)]
        for row, ws in zip(rows, weights, strict=True)
    ]
    joined = rejoin(tagged)
    return [s._replace(source=names[s.source][0]) for s in joined], [names[s.source][1] for s in joined]
