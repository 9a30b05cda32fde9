"""The same sums on a CPU: tensors of one group are gone through in pieces that stay in the cache for all ten products."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from scale_kernels.chunks import CHUNK, Chunk, chunks_of
from scale_kernels.encode.reference import COLUMNS
from scale_kernels.tensor_table import Lists


class CpuEncoder:
    """Chunks of tensors of `sizes`, and the memory into which small or bf16 pieces are copied."""

    def __init__(self, sizes: Sequence[int], group_N: Sequence[int], groups: int) -> None:
        self.chunks = chunks_of(sizes, group_N)
        self.groups = groups
        self._group_K = torch.tensor([chunk.group for chunk in self.chunks], dtype=torch.int64)
        self._buffers = torch.empty(4, CHUNK).unbind()

    def __call__(self, lists: Lists) -> Tensor:
        """(G, 12) fp32. Products of a chunk are summed in fp32, chunks in fp64."""
        flat = [None if tensors is None else [x.view(-1) for x in tensors] for tensors in lists]
        rows_KC = torch.zeros(len(self.chunks), len(COLUMNS))
        for row_C, chunk in zip(rows_KC.unbind(), self.chunks, strict=True):
            vectors = [_read(x, chunk, buffer) for x, buffer in zip(flat, self._buffers, strict=True)]
            _chunk_sums(row_C, vectors)
        out_GC = torch.zeros(self.groups, len(COLUMNS), dtype=torch.float64)
        out_GC.index_add_(0, self._group_K, rows_KC.double())
        for group in {chunk.group for chunk in self.chunks}:
            out_GC[group, 10] = rows_KC[self._group_K == group, 10].max()
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
    torch.maximum(-grad.amin(), grad.amax(), out=row_C[10])
    if not row_C[10].isfinite():
        row_C[11] = (~grad.isfinite()).sum()
