"""Two launches: sums of every tile, then sums of every group over its tiles. No atomics: the order of adding is fixed."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scale_kernels.encode.reference import COLUMNS
from scale_kernels.tensor_pointers import tensor_pointer
from scale_kernels.tensor_table import TensorTable

TILE = 32768
"""Elements that one program reads from each list."""
THREADS = 256
REDUCE_BLOCK = 1024


@triton.jit
def _load(pointer, offsets, left, ON: tl.constexpr, MASKED: tl.constexpr):
    if not ON:
        return tl.zeros(offsets.shape, tl.float32)
    if MASKED:
        return tl.load(pointer + offsets, mask=offsets < left, other=0.0).to(tl.float32)
    return tl.load(pointer + offsets).to(tl.float32)


@triton.jit
def _add(sum_R, x_RW, y_RW, ON: tl.constexpr):
    """Elements of one thread are summed in registers first: one accumulator per product instead of WIDTH."""
    if ON:
        sum_R += tl.sum(x_RW * y_RW, 1)
    return sum_R


@triton.jit
def _accumulate(sums, pointers, begin, left, offsets_RW, GIVEN: tl.constexpr, MASKED: tl.constexpr):
    """Add one step of ROWS x WIDTH elements to the twelve accumulators."""
    pp, pg, pd, pu, gg, gd, gu, dd, du, uu, biggest, bad = sums
    P: tl.constexpr = GIVEN & 1 != 0
    G: tl.constexpr = GIVEN & 2 != 0
    D: tl.constexpr = GIVEN & 4 != 0
    U: tl.constexpr = GIVEN & 8 != 0
    p = _load(pointers[0] + begin, offsets_RW, left, P, MASKED)
    g = _load(pointers[1] + begin, offsets_RW, left, G, MASKED)
    d = _load(pointers[2] + begin, offsets_RW, left, D, MASKED)
    u = _load(pointers[3] + begin, offsets_RW, left, U, MASKED)
    pp, pg, pd, pu = _add(pp, p, p, P), _add(pg, p, g, P and G), _add(pd, p, d, P and D), _add(pu, p, u, P and U)
    gg, gd, gu = _add(gg, g, g, G), _add(gd, g, d, G and D), _add(gu, g, u, G and U)
    dd, du, uu = _add(dd, d, d, D), _add(du, d, u, D and U), _add(uu, u, u, U)
    # The bits of |g| grow with |g|, infinity above all numbers and NaN above infinity: an integer maximum keeps both.
    bits_RW = g.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    biggest = tl.maximum(biggest, tl.max(bits_RW, 1))
    bad += tl.sum((bits_RW >= 0x7F800000).to(tl.int32), 1)
    return pp, pg, pd, pu, gg, gd, gu, dd, du, uu, biggest, bad


@triton.jit
def tile_sums(
    addresses,
    sizes,
    tiles,
    partials,
    tensors,
    slots,
    GIVEN: tl.constexpr,
    BF16: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """`partials` (12, slots) fp32: the sums of each tile. WIDTH neighbouring elements belong to one thread."""
    STEP: tl.constexpr = ROWS * WIDTH
    row = tiles + 3 * tl.program_id(0)
    slot = tl.load(row)
    tensor = tl.load(row + 1)
    start = tl.load(row + 2).to(tl.int64) * TILE
    left = tl.minimum(tl.load(sizes + tensor) - start, TILE).to(tl.int32)
    pointers = (
        tensor_pointer(addresses, tensors, tensor, 0, BF16, ALIGNED) + start,
        tensor_pointer(addresses, tensors, tensor, 1, BF16, ALIGNED) + start,
        tensor_pointer(addresses, tensors, tensor, 2, BF16, ALIGNED) + start,
        tensor_pointer(addresses, tensors, tensor, 3, BF16, ALIGNED) + start,
    )
    offsets_RW = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    zero = tl.zeros([ROWS], tl.float32)
    none = tl.zeros([ROWS], tl.int32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, none, none)
    whole = left // STEP * STEP
    for begin in range(0, whole, STEP):  # no mask: it would make every load one element wide
        sums = _accumulate(sums, pointers, begin, left, offsets_RW, GIVEN, False)
    if whole < left:
        sums = _accumulate(sums, pointers, whole, left - whole, offsets_RW, GIVEN, True)
    for column in tl.static_range(10):
        tl.store(partials + column * slots + slot, tl.sum(sums[column]))
    tl.store(partials + 10 * slots + slot, tl.max(sums[10]).to(tl.float32, bitcast=True))
    tl.store(partials + 11 * slots + slot, tl.sum(sums[11]).to(tl.float32))


@triton.jit
def group_sums(partials, first_tile, out, slots, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One program adds one column of one group, in float64: counts stay exact and sums lose nothing more."""
    group = tl.program_id(0)
    column = tl.program_id(1)
    begin = tl.load(first_tile + group)
    end = tl.load(first_tile + group + 1)
    total = tl.zeros([BLOCK], tl.float64)
    biggest = tl.zeros([BLOCK], tl.int32)
    for block in range(begin, end, BLOCK):
        offsets = block + tl.arange(0, BLOCK)
        part = tl.load(partials + column * slots + offsets, mask=offsets < end, other=0.0)
        total += part.to(tl.float64)
        biggest = tl.maximum(biggest, part.to(tl.int32, bitcast=True))
    result = tl.sum(total).to(tl.float32)
    if column == 10:
        result = tl.max(biggest).to(tl.float32, bitcast=True)
    tl.store(out + group * COLUMNS + column, result)


def shape_of(bf16: int, given: int) -> dict[str, int]:
    """ROWS and WIDTH: 16 bytes a thread from the widest list, so that no load is wider than a GPU has."""
    width = 8 if bf16 == given else 4
    return {"ROWS": THREADS, "WIDTH": width}


def encode_triton(table: TensorTable, given: int, groups: int) -> Tensor:
    """(G, 12) fp32 of the lists in `table`, which was built with tiles of `TILE` elements."""
    partials_CT = torch.empty(len(COLUMNS), max(1, table.tiles), dtype=torch.float32, device=table.device)
    out_GC = torch.empty(groups, len(COLUMNS), dtype=torch.float32, device=table.device)
    slots = partials_CT.shape[1]
    for launch in table.launches:
        tile_sums[(len(launch.tiles_T3),)](
            table.addresses_SN,
            table.sizes_N,
            launch.tiles_T3,
            partials_CT,
            len(table.sizes_N),
            slots,
            GIVEN=given,
            BF16=launch.bf16,
            ALIGNED=launch.aligned,
            TILE=TILE,
            **shape_of(launch.bf16, given),
            num_warps=THREADS // 32,
            enable_fp_fusion=True,
        )
    group_sums[(groups, len(COLUMNS))](
        partials_CT,
        table.first_tile_G1,
        out_GC,
        slots,
        COLUMNS=len(COLUMNS),
        BLOCK=REDUCE_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out_GC
