"""The same sums on a CPU: tensors of one group are gone through in pieces that stay in the cache for all ten products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from scale_kernels.encode.reference import COLUMNS
from scale_kernels.tensor_table import Lists

CHUNK = 65536
"""Elements per list: four lists of fp32 fill 1 MiB, what a core of a server has as second-level cache."""


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


def encode_cpu(lists: Lists, chunks: Sequence[Chunk], groups: int) -> Tensor:
    """(G, 12) fp32. Products of a chunk are summed in fp32, chunks in fp64."""
    flat = [None if tensors is None else [x.view(-1) for x in tensors] for tensors in lists]
    buffer_SC = torch.empty(len(lists), CHUNK)
    out_GC = torch.zeros(groups, len(COLUMNS), dtype=torch.float64)
    rows_KC = torch.zeros(len(chunks), len(COLUMNS))
    group_K = torch.tensor([chunk.group for chunk in chunks], dtype=torch.int64)
    for row_C, chunk in zip(rows_KC.unbind(), chunks, strict=True):
        _chunk_sums(row_C, [_read(x, chunk, room_C) for x, room_C in zip(flat, buffer_SC.unbind(), strict=True)])
    out_GC.index_add_(0, group_K, rows_KC.double())
    for group in {chunk.group for chunk in chunks}:
        out_GC[group, 10] = rows_KC[group_K == group, 10].max()
    return out_GC.float()


def _read(tensors: Sequence[Tensor] | None, chunk: Chunk, room_C: Tensor) -> Tensor | None:
    """The chunk as one fp32 vector: a view where it is one already, else copied into `room_C`."""
    if tensors is None:
        return None
    views = [tensors[n][begin:end] for n, begin, end in chunk.pieces]
    if len(views) == 1 and views[0].dtype is torch.float32:
        return views[0]
    torch._foreach_copy_(list(room_C[: chunk.length].split([len(view) for view in views])), views)
    return room_C[: chunk.length]


def _chunk_sums(row_C: Tensor, vectors: Sequence[Tensor | None]) -> None:
    sums = [
        torch.dot(x, y) if x is not None and y is not None else row_C.new_zeros(())
        for x, y in combinations_with_replacement(vectors, 2)
    ]
    torch.stack(sums, out=row_C[: len(sums)])
    grad = vectors[1]
    if grad is None:
        return
    low, high = torch.aminmax(grad)
    row_C[10] = torch.maximum(-low, high)
    if not row_C[10].isfinite():
        row_C[11] = (~grad.isfinite()).sum()
