"""What the kernel computes, in plain torch: the step, Philox, and stochastic rounding to bf16.

Philox4x32-10 is from Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW32 = 0xFFFFFFFF
SHARED_BY = 8
"""Neighbouring elements that share one call of Philox: 128 bits, 16 for each."""


def stepped(param: Tensor, directions: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Tensor:
    """p + c_0 d_0 + c_1 d_1 ... in fp32, left to right; each product and each sum is rounded (no fused multiply-add)."""
    moved = param.float()
    for direction, coefficient in zip(directions, coefficients, strict=True):
        moved = moved + coefficient * direction.float()
    return moved


def delta_reference(
    params: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
    c_KG: Tensor,
    group_N: Sequence[int],
    first_index_N: Sequence[int],
    seed: int,
) -> None:
    """Move `params` in place. `first_index_N` is where each tensor begins in the numbering of all elements."""
    for n, param in enumerate(params):
        moved = stepped(param, [tensors[n] for tensors in directions], list(c_KG[:, group_N[n]].unbind()))
        if param.dtype is torch.bfloat16:
            moved = round_stochastic(moved, first_index_N[n], seed)
        param.copy_(moved)


def round_stochastic(x: Tensor, first_index: int, seed: int) -> Tensor:
    """fp32 to one of the two neighbouring bf16, the nearer one more often, so that the mean is x.

    16 random bits are added below the bits that bf16 keeps, and the lower half is cut off. Numbers bf16 has stay as they
    are; a finite number never becomes infinite; NaN stays NaN.
    """
    index = torch.arange(x.numel(), device=x.device) + first_index
    bits = x.reshape(-1).view(torch.int32).long() & LOW32
    kept = bits & 0xFFFF0000
    raised = (bits + random_bits(index, seed)) & 0xFFFF0000
    raised = torch.where((raised & 0x7F800000) == 0x7F800000, kept, raised)
    raised = torch.where(x.reshape(-1).isnan(), 0x7FC00000, raised)
    return (raised >> 16).to(torch.int16).view(torch.bfloat16).view(x.shape)


def random_bits(index: Tensor, seed: int) -> Tensor:
    """16 uniform bits for each element number: word (index % 8) // 2 of Philox at counter index // 8, its lower half first."""
    words = torch.stack(philox(index // SHARED_BY, seed))
    place = index % SHARED_BY
    word = words.gather(0, (place // 2)[None])[0]
    return (word >> (place % 2 * 16)) & 0xFFFF


def philox(counter: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits for each int64 counter; the seed's lower and upper 32 bits are the key."""
    zero = torch.zeros_like(counter)
    return philox_rounds((counter & LOW32, (counter >> 32) & LOW32, zero, zero), (seed & LOW32, seed >> 32 & LOW32))


def philox_rounds(
    counters: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on four words of 32 bits, held in int64."""
    c0, c1, c2, c3 = counters
    k0, k1 = key
    for _ in range(10):
        # int64 wraps around, which leaves all 64 bits of the product right.
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> 32 & LOW32) ^ c1 ^ k0,
            product1 & LOW32,
            (product0 >> 32 & LOW32) ^ c3 ^ k1,
            product0 & LOW32,
        )
        k0, k1 = (k0 + WEYL[0]) & LOW32, (k1 + WEYL[1]) & LOW32
    return c0, c1, c2, c3
