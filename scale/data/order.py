"""The order in which an epoch visits its data, without a table: position in the epoch -> piece of a document."""

from __future__ import annotations

import math

import numpy as np

from scale.data.packing import Span

_ROUNDS = 6
_CHUNK = 1024
"""Places computed at a time, so that numpy's overhead is shared."""


def permuted(places: np.ndarray, size: int, key: list[int]) -> np.ndarray:
    """Images of `places` (int, below `size`) under a pseudo-random permutation of range(size) that `key` selects.

    A Feistel network on the smallest even number of bits that hold `size`, walked along its cycle until the value is in
    range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Needs no memory, whatever the size.
    """
    half = max(1, math.ceil(math.log2(max(size, 2)) / 2))
    mask = np.uint64((1 << half) - 1)
    keys = np.random.default_rng(key).integers(0, 2**63, _ROUNDS, dtype=np.uint64)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right + round_key) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= size
    return values.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class EpochOrder:
    """Documents of one source cut into pieces of at most `longest` positions, in a new seeded order each epoch.

    Pieces rather than documents are shuffled: neighbouring steps would otherwise read the same few long documents.
    `size` is the number of pieces, `last` the pieces up to and including each document; documents of a single token have
    none, as there is nothing to predict.
    """

    def __init__(self, source: int, lengths: np.ndarray, longest: int, seed: int):
        self.source, self.lengths, self.longest, self.seed = source, lengths, longest, seed
        self.last = np.cumsum(-(-np.maximum(lengths - 1, 0) // longest))
        self.size = int(self.last[-1]) if len(lengths) else 0
        self.positions = int(np.maximum(lengths - 1, 0).sum())
        self._chunk: tuple[int, int] = (-1, -1)
        self._spans: list[Span] = []

    def pieces(self, docs_N: np.ndarray, starts_N: np.ndarray) -> np.ndarray:
        """(N,) numbers (0 to size - 1) of the pieces that hold these positions."""
        return self._before(docs_N) + starts_N // self.longest

    def span(self, epoch: int, place: int) -> Span:
        """The piece at `place` (0 to size - 1) of an epoch."""
        chunk = (epoch, place // _CHUNK)
        if chunk != self._chunk:
            self._chunk, self._spans = chunk, self._read(epoch, chunk[1] * _CHUNK)
        return self._spans[place % _CHUNK]

    def _read(self, epoch: int, first: int) -> list[Span]:
        places = np.arange(first, min(first + _CHUNK, self.size))
        pieces = permuted(places, self.size, [self.seed, 0, self.source, epoch])
        docs = np.searchsorted(self.last, pieces, side="right")
        starts = (pieces - self._before(docs)) * self.longest
        stops = np.minimum(starts + self.longest, self.lengths[docs] - 1)
        return [Span(self.source, int(d), int(a), int(b)) for d, a, b in zip(docs, starts, stops, strict=True)]

    def _before(self, docs_N: np.ndarray) -> np.ndarray:
        """Pieces of earlier documents."""
        return np.where(docs_N > 0, self.last[docs_N - 1], 0)
