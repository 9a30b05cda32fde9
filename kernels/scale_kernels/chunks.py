"""On a CPU: lists of tensors in pieces that stay in the cache while all is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHUNK = 65536
"""Elements per list: four lists of fp32 fill 1 MiB, the second-level cache of a server's core."""


@dataclass(frozen=True)
class Chunk:
    """Pieces (tensor, first element, end) of one group that are read together: many small tensors or part of one."""

    group: int
    pieces: list[tuple[int, int, int]]
    length: int


def chunks_of(sizes: Sequence[int], group_N: Sequence[int], chunk: int = CHUNK) -> list[Chunk]:
    """All elements, by group, in chunks of at most `chunk`."""
    out: list[Chunk] = []
    for group in sorted(set(group_N)):
        pieces: list[tuple[int, int, int]] = []
        room = chunk
        for n, size in enumerate(sizes):
            begin = 0
            while group_N[n] == group and begin < size:
                end = min(size, begin + room)
                pieces.append((n, begin, end))
                room -= end - begin
                begin = end
                if room == 0:
                    out.append(Chunk(group, pieces, chunk))
                    pieces, room = [], chunk
        if pieces:
            out.append(Chunk(group, pieces, chunk - room))
    return out
