"""Lists of tensors a part at a time, so that what is made on the way stays small beside the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

MOST = 2**26
"""Elements of a part (256 MiB in fp32), unless a single tensor has more."""


def runs(tensors: Sequence[Tensor], most: int = MOST) -> Iterator[slice]:
    """Slices of the list that hold at most so many elements, or one tensor; all of them in order. No tensors: none."""
    begin, size = 0, 0
    for n, tensor in enumerate(tensors):
        if n > begin and size + tensor.numel() > most:
            yield slice(begin, n)
            begin, size = n, 0
        size += tensor.numel()
    if begin < len(tensors):
        yield slice(begin, len(tensors))
