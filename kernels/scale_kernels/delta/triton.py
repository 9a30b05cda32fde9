"""One launch over all tensors: read the parameter and K directions, write the parameter."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from scale_kernels.tensor_pointers import tensor_pointer
from scale_kernels.tensor_table import TensorTable

TILE = 16384
"""Elements of one program."""
THREADS = 256


@triton.jit
def _round_stochastic(x_RW, index_R, column_W, seed):
    """fp32 to the upper 16 bits of one of the two neighbouring bf16; see `reference.round_stochastic`."""
    counter_R = index_R >> 3
    zero_R = tl.zeros_like(counter_R).to(tl.uint32)
    low_R, high_R = counter_R.to(tl.uint32), (counter_R >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low_R, high_R, zero_R, zero_R)
    pair_W = column_W[None, :] // 2
    word_RW = tl.where(
        pair_W < 2,
        tl.where(pair_W == 0, w0[:, None], w1[:, None]),
        tl.where(pair_W == 2, w2[:, None], w3[:, None]),
    )
    random_RW = (word_RW >> (column_W[None, :] % 2 * 16).to(tl.uint32)) & 0xFFFF
    bits_RW = x_RW.to(tl.uint32, bitcast=True)
    raised_RW = (bits_RW + random_RW) & 0xFFFF0000
    # The neighbour above the largest number is infinity: cut off instead. Infinity itself has nothing to cut.
    raised_RW = tl.where((raised_RW & 0x7F800000) == 0x7F800000, bits_RW & 0xFFFF0000, raised_RW)
    raised_RW = tl.where(x_RW != x_RW, 0x7FC00000, raised_RW)
    return (raised_RW >> 16).to(tl.int16)


@triton.jit
def _move(
    pointers,
    c,
    begin,
    left,
    offsets_RW,
    index_R,
    column_W,
    seed,
    K: tl.constexpr,
    BF16: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of ROWS x WIDTH elements."""
    place_RW = pointers[0] + begin + offsets_RW
    mask = offsets_RW < left
    x_RW = tl.load(place_RW, mask=mask).to(tl.float32) if MASKED else tl.load(place_RW).to(tl.float32)
    for k in tl.static_range(K):
        from_RW = pointers[k + 1] + begin + offsets_RW
        d_RW = tl.load(from_RW, mask=mask).to(tl.float32) if MASKED else tl.load(from_RW).to(tl.float32)
        x_RW = x_RW + c[k] * d_RW
    y_RW = x_RW
    if BF16 & 1:
        y_RW = _round_stochastic(x_RW, index_R + begin, column_W, seed).to(tl.bfloat16, bitcast=True)
    if MASKED:
        tl.store(place_RW, y_RW, mask=mask)
    else:
        tl.store(place_RW, y_RW)


@triton.jit(do_not_specialize=["seed"])
def move(
    addresses,
    sizes,
    first_index,
    groups_of,
    tiles,
    coefficients,
    seed,
    tensors,
    groups,
    K: tl.constexpr,
    BF16: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """List 0 of the table is the parameters, list 1 + k direction k; `coefficients` (K, groups) fp32."""
    STEP: tl.constexpr = ROWS * WIDTH
    row = tiles + 3 * tl.program_id(0)
    tensor = tl.load(row + 1)
    start = tl.load(row + 2).to(tl.int64) * TILE
    left = tl.minimum(tl.load(sizes + tensor) - start, TILE).to(tl.int32)
    group = tl.load(groups_of + tensor)
    pointers = (tensor_pointer(addresses, tensors, tensor, 0, BF16, ALIGNED) + start,)
    c = ()
    for k in tl.static_range(K):
        pointers += (tensor_pointer(addresses, tensors, tensor, k + 1, BF16, ALIGNED) + start,)  # type: ignore[assignment]
        c += (tl.load(coefficients + k * groups + group),)  # type: ignore[assignment]
    column_W = tl.arange(0, WIDTH)
    offsets_RW = tl.arange(0, ROWS)[:, None] * WIDTH + column_W[None, :]
    index_R = tl.load(first_index + tensor) + start + tl.arange(0, ROWS) * WIDTH
    whole = left // STEP * STEP
    for begin in range(0, whole, STEP):  # no mask: it would make every load one element wide
        _move(pointers, c, begin, left, offsets_RW, index_R, column_W, seed, K, BF16, False)
    if whole < left:
        _move(pointers, c, whole, left - whole, offsets_RW, index_R, column_W, seed, K, BF16, True)


def shape_of(bf16: int) -> dict[str, int]:
    """ROWS and WIDTH: neighbouring elements of a thread are 16 bytes of the parameter; 8 share one call of Philox."""
    return {"ROWS": THREADS, "WIDTH": 8 if bf16 & 1 else 4}


def delta_triton(table: TensorTable, c_KG: Tensor, seed: int) -> None:
    """Move list 0 of `table` (built with tiles of `TILE` elements) in place."""
    for launch in table.launches:
        move[(len(launch.tiles_T3),)](
            table.addresses_SN,
            table.sizes_N,
            table.first_index_N,
            table.group_N,
            launch.tiles_T3,
            c_KG,
            seed,
            len(table.sizes_N),
            c_KG.shape[1],
            K=c_KG.shape[0],
            BF16=launch.bf16,
            ALIGNED=launch.aligned,
            TILE=TILE,
            **shape_of(launch.bf16),
            num_warps=THREADS // 32,
            enable_fp_fusion=False,
        )
