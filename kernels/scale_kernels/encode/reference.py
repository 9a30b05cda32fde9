"""What the kernel computes, in plain torch and float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PAIRS = ("pp", "pg", "pd", "pu", "gg", "gd", "gu", "dd", "du", "uu")
COLUMNS = (*PAIRS, "max_abs_g", "nonfinite_g")
LETTERS = "pgdu"
"""Of parameter, gradient, drift and last update: the order of the lists."""


def encode_reference(lists: Sequence[Sequence[Tensor] | None], group_N: Sequence[int], groups: int) -> Tensor:
    """Columns `COLUMNS` of every group, (G, 12) fp32. Sums over no elements, or with a list that is None, are 0."""
    out_GC = torch.zeros(groups, len(COLUMNS), dtype=torch.float64)
    for n, group in enumerate(group_N):
        flat = {a: x[n].double().flatten().cpu() for a, x in zip(LETTERS, lists, strict=True) if x is not None}
        row_C = out_GC[group]
        for column, pair in enumerate(PAIRS):
            if all(letter in flat for letter in pair):
                row_C[column] += (flat[pair[0]] * flat[pair[1]]).sum()
        if "g" in flat and flat["g"].numel():
            row_C[10] = torch.maximum(row_C[10], flat["g"].abs().max())
            row_C[11] += (~flat["g"].isfinite()).sum()
    return out_GC.float()
