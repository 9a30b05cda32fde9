"""The device side of `tensor_table`: pointers out of a table of addresses."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tensor_pointer(addresses, tensors, tensor, s: tl.constexpr, BF16: tl.constexpr, ALIGNED: tl.constexpr):
    """The first element of tensor number `tensor` of list `s`, which is bf16 if bit s of BF16 is set, otherwise fp32.

    The hint goes on the pointer, not on the integer it is made of: only there do loads become 16 bytes wide.
    """
    address = tl.load(addresses + s * tensors + tensor)
    pointer = address.to(tl.pointer_type(tl.bfloat16 if (BF16 >> s) & 1 else tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
