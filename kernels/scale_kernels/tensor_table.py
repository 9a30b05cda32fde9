"""Lists of tensors as one table in device memory, so that one launch goes over all of them.

S lists of N tensors each; the tensors of one index have the same shape in every list that is given. A *tile* is a run of
at most `tile` elements of one tensor: the work of one program. Tiles are numbered by group, so that what a kernel writes
per tile lies together for each group whatever launch wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

Lists = Sequence[Sequence[Tensor] | None]
DTYPES = (torch.float32, torch.bfloat16)
ALIGNMENT = 16
"""Bytes of the widest load of a GPU."""
INDEX_MULTIPLE = 8
"""First indices of tensors are multiples of this, so that so many neighbours share one call of a random generator."""


@dataclass(frozen=True)
class Launch:
    """Tiles for one compiled kernel, (T, 3) int32: number of the tile, its tensor, which run of that tensor.

    Bit s of `bf16` says that list s is bf16, otherwise fp32. `aligned`: all addresses are multiples of 16 bytes.
    """

    bf16: int
    aligned: bool
    tiles_T3: Tensor


def given(lists: Lists) -> int:
    """Bit s says that list s is not None."""
    return sum(1 << s for s, tensors in enumerate(lists) if tensors is not None)


def check(lists: Lists, names: Sequence[str], group_N: Sequence[int], groups: int) -> None:
    """ValueError unless lengths, shapes, dtypes, devices and group ids are what kernels take."""
    present = [(name, tensors) for name, tensors in zip(names, lists, strict=True) if tensors is not None]
    if not present:
        raise ValueError(f"no list of tensors: at least one of {', '.join(names)} must be given")
    for name, tensors in present:
        if len(tensors) != len(group_N):
            raise ValueError(f"{name} has {len(tensors)} tensors, but group ids are given for {len(group_N)}")
    wrong = [group for group in group_N if not 0 <= group < groups]
    if wrong:
        raise ValueError(f"group id {wrong[0]} is not in 0..{groups - 1}")
    first_name, first = present[0]
    for name, tensors in present:
        for n, (tensor, model) in enumerate(zip(tensors, first, strict=True)):
            place = f"{name}[{n}]"
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{place} is {tensor.dtype}: only fp32 and bf16 are read")
            if tensor.shape != model.shape:
                raise ValueError(f"{place} is {tuple(tensor.shape)}, but {first_name}[{n}] is {tuple(model.shape)}")
            if tensor.device != first[0].device:
                raise ValueError(f"{place} is on {tensor.device}, but {first_name}[0] is on {first[0].device}")
            if not tensor.is_contiguous():
                raise ValueError(f"{place} is not contiguous")


def describe(lists: Lists) -> list[list[tuple] | None]:
    """All that `check` looks at: lists of the same description need no second check."""
    return [
        None if tensors is None else [(x.shape, x.dtype, x.device, x.is_contiguous()) for x in tensors]
        for tensors in lists
    ]


def first_indices(sizes: Sequence[int]) -> list[int]:
    """Where each tensor begins if all are laid end to end, each rounded up to `INDEX_MULTIPLE` elements."""
    rounded = [-(-size // INDEX_MULTIPLE) * INDEX_MULTIPLE for size in sizes]
    return [0, *accumulate(rounded)][: len(sizes)]


class TensorTable:
    """Addresses (S, N) int64, sizes and first indices (N) int64, groups (N) int32, first tile of each group (G + 1) int32.

    One launch is enough unless dtypes or alignment differ inside a list. The lists must have passed
    `check`. The table holds addresses only and keeps no tensor alive: call `follow` before every use.
    """

    def __init__(self, lists: Lists, group_N: Sequence[int], groups: int, tile: int) -> None:
        present = [tensors for tensors in lists if tensors is not None]
        self.device = present[0][0].device if present[0] else torch.device("cpu")
        sizes = [x.numel() for x in present[0]]
        sizes_N = torch.tensor(sizes, dtype=torch.int64)
        order = sorted(range(len(sizes)), key=lambda n: group_N[n])
        rows_T3, first_tile_G1 = _tiles(sizes_N, torch.tensor(order, dtype=torch.int64), group_N, groups, tile)

        self.tiles = len(rows_T3)
        self.sizes_N = self._put(sizes_N)
        self.first_index_N = self._put(torch.tensor(first_indices(sizes), dtype=torch.int64))
        self.group_N = self._put(torch.tensor(group_N, dtype=torch.int32))
        self.first_tile_G1 = self._put(first_tile_G1)
        self._addresses = _addresses(lists)
        self._kinds = _kinds(lists, self._addresses)
        self.addresses_SN = self._put(torch.tensor(self._addresses, dtype=torch.int64))
        self.launches = self._launches(rows_T3)

    def follow(self, lists: Lists) -> bool:
        """Take over where tensors of the same description lie now; False if alignment changed: build another table."""
        addresses = _addresses(lists)
        if addresses != self._addresses:
            if _kinds(lists, addresses) != self._kinds:
                return False
            self._addresses = addresses
            self.addresses_SN = self._put(torch.tensor(addresses, dtype=torch.int64))
        return True

    def _launches(self, rows_T3: Tensor) -> list[Launch]:
        kinds = sorted(set(self._kinds))
        kind_N = torch.tensor([kinds.index(kind) for kind in self._kinds], dtype=torch.int64)
        kind_T = kind_N[rows_T3[:, 1].long()]
        chosen = [rows_T3[kind_T == k] for k in range(len(kinds))]
        pairs = zip(kinds, chosen, strict=True)
        return [Launch(bf16, aligned, self._put(rows)) for (bf16, aligned), rows in pairs if len(rows)]

    def _put(self, table: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return table.contiguous()
        return table.contiguous().pin_memory().to(self.device, non_blocking=True)


def _tiles(sizes_N: Tensor, order_N: Tensor, group_N: Sequence[int], groups: int, tile: int) -> tuple[Tensor, Tensor]:
    """Rows of all tiles in the order of their groups, and the number of the first tile of each group."""
    count_N = (sizes_N[order_N] + tile - 1) // tile
    tensor_T = order_N.repeat_interleave(count_N)
    number_T = torch.arange(len(tensor_T))
    chunk_T = number_T - (count_N.cumsum(0) - count_N).repeat_interleave(count_N)
    ids_N = torch.tensor(group_N, dtype=torch.int64)[order_N]
    tiles_G = torch.zeros(groups, dtype=torch.int64).index_add_(0, ids_N, count_N)
    first_tile_G1 = torch.cat([torch.zeros(1, dtype=torch.int64), tiles_G.cumsum(0)])
    return torch.stack([number_T, tensor_T, chunk_T], 1).int(), first_tile_G1.int()


def _addresses(lists: Lists) -> list[list[int]]:
    """Where every tensor begins; 0 throughout for a list that is None."""
    count = max(len(tensors) for tensors in lists if tensors is not None)
    return [[0] * count if tensors is None else [x.data_ptr() for x in tensors] for tensors in lists]


def _kinds(lists: Lists, addresses: list[list[int]]) -> list[tuple[int, bool]]:
    """Of every index: which lists are bf16, and whether all addresses are aligned."""
    kinds = []
    for n, column in enumerate(zip(*addresses, strict=True)):
        bf16 = sum(1 << s for s, tensors in enumerate(lists) if tensors and tensors[n].dtype is torch.bfloat16)
        kinds.append((bf16, all(address % ALIGNMENT == 0 for address in column)))
    return kinds
