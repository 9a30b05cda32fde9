"""Lists of tensors for the tests of encode and delta, and both kernels as functions an interpreting process can run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ODD = [(0,), (1,), (3, 5, 7), (2500,), (2048,), (33, 65), (7, 0, 3), (4097,)]
"""Empty, single, 3-D, a whole number of steps, several tiles with a rest."""
ODD_GROUPS = [0, 2, 1, 2, 4, 0, 3, 4]
"""Of 6 groups; 3 has only an empty tensor, 5 none at all."""
SMALL_TILE = 2048
FP32, BF16 = torch.float32, torch.bfloat16


GUARD = 64
"""Elements of NaN before and after every tensor: what is read there shows in any sum."""


WRITTEN = 7.0
"""The guard of what is written: with NaN read beside it, a write changes it."""


def tensors(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [guarded(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def guarded(tensor: Tensor, shift: int = 0, guard: float = math.nan) -> Tensor:
    """The same values between guards, `shift` elements after an address that is a multiple of 16."""
    around = torch.full((tensor.numel() + 2 * GUARD,), guard, dtype=tensor.dtype, device=tensor.device)
    return around[GUARD + shift :][: tensor.numel()].view(tensor.shape).copy_(tensor)


def unaligned(tensor: Tensor) -> Tensor:
    """The same values at an address that is no multiple of 16."""
    return guarded(tensor, shift=1)


def untouched(tensor: Tensor, guard: float) -> bool:
    """Whether nothing was written around a guarded tensor."""
    around = tensor._base
    assert around is not None
    return int((around == guard).sum()) == 2 * GUARD + int((tensor == guard).sum())


def four_lists(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], seed: int = 0) -> list[list[Tensor]]:
    return [tensors(shapes, dtype, seed + s) for s, dtype in enumerate(dtypes)]


def run_encode(lists, group_N: Sequence[int], groups: int, tile: int = SMALL_TILE) -> Tensor:
    """The kernel, whatever device the tensors are on."""
    from scale_kernels.encode import triton as kernel
    from scale_kernels.tensor_table import TensorTable, given

    kernel.TILE = tile
    return kernel.encode_triton(TensorTable(lists, group_N, groups, tile), given(lists), groups)


def run_delta(params, directions, c_KG: Tensor, group_N: Sequence[int], seeds: Sequence[int], tile: int = SMALL_TILE):
    """Moved copies of `params`, a list for each seed."""
    from scale_kernels.delta import triton as kernel
    from scale_kernels.tensor_table import TensorTable

    kernel.TILE = tile
    out = []
    for seed in seeds:
        moved = [guarded(x, shift=x.data_ptr() % 16 != 0, guard=WRITTEN) for x in params]
        table = TensorTable([moved, *directions], group_N, c_KG.shape[1], tile)
        kernel.delta_triton(table, c_KG, seed)
        assert all(untouched(x, WRITTEN) for x in moved), "written outside of a tensor"
        out.append(moved)
    return out
