"""Laying documents into rows. A span is a run of input positions of one document; a row is a list of spans.

A document of n tokens has n-1 input positions: position t reads token t and learns token t+1. The start token of a
text is thus an input and never a target, its end-of-text a target and never an input. A span may end inside a document
and still know the target of its last position.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Input positions [start, stop) of document `doc` of source `source`."""

    source: int
    doc: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


Row = list[Span]


def best_fit(spans: Iterable[Span], seq_len: int) -> list[Row]:
    """Pack spans into rows of `seq_len`; only spans longer than a row are cut.

    Best-fit decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830): each span goes
    into the row that it leaves with the least room.
    """
    pieces = [piece for span in spans for piece in cut(span, seq_len)]
    pieces.sort(key=lambda p: (-p.length, p))
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (free positions, row), sorted
    for piece in pieces:
        at = bisect_left(room, (piece.length, -1))
        free, row = room.pop(at) if at < len(room) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        if free > piece.length:
            insort(room, (free - piece.length, row))
    return rows


def concat(spans: Iterable[Span], seq_len: int) -> list[Row]:
    """One stream of documents cut at row ends; only the last row may have room left."""
    rows: list[Row] = [[]]
    free = seq_len
    for span in spans:
        start = span.start
        while start < span.stop:
            stop = min(span.stop, start + free)
            rows[-1].append(span._replace(start=start, stop=stop))
            free -= stop - start
            start = stop
            if free == 0:
                rows.append([])
                free = seq_len
    return rows if rows[-1] else rows[:-1]


def cut(span: Span, longest: int) -> list[Span]:
    """A span as pieces of at most `longest` positions."""
    return [
        span._replace(start=start, stop=min(span.stop, start + longest))
        for start in range(span.start, span.stop, longest)
    ]


def rejoin(rows: Sequence[Row]) -> list[Span]:
    """The spans of some rows with neighbouring pieces of a document joined again, so that another length can cut them."""
    joined: list[Span] = []
    for span in sorted(span for row in rows for span in row):
        last = joined[-1] if joined else None
        if last is not None and (last.source, last.doc, last.stop) == (span.source, span.doc, span.start):
            joined[-1] = last._replace(stop=span.stop)
        else:
            joined.append(span)
    return joined
