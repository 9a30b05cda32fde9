"""Chooses: Triton on CUDA, torch._foreach over cache-sized chunks on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scale_kernels.chunks import chunks_of
from scale_kernels.delta.reference import round_stochastic, stepped
from scale_kernels.tensor_table import TensorTable, check, describe, first_indices

MOST_DIRECTIONS = 4
LARGEST_SEED = 2**63 - 1


class DeltaPlan:
    """Steps of tensors that keep their shapes: what depends on shapes and addresses is built once.

    `group_N` says the group of each tensor, 0 <= id < `groups`.
    """

    def __init__(self, group_N: Sequence[int], groups: int) -> None:
        self.group_N = list(group_N)
        self.groups = groups
        self._described: list | None = None
        self._table: TensorTable | None = None

    def __call__(
        self, params: Sequence[Tensor], directions: Sequence[Sequence[Tensor]], c_KG: Tensor, seed: int | None = None
    ) -> None:
        """p += sum over k of c_KG[k, group of p] * directions[k], in place.

        fp32 parameters: each product and each sum rounded, k in ascending order, on every device the same bits. bf16
        parameters: that fp32 result rounded stochastically with `seed`, which must then be given. Raises ValueError for
        coefficients that are not finite (one wait for the device) or tensors that do not fit.
        """
        lists = (params, *directions)
        if (described := describe(lists)) != self._described:
            names = ("params", *(f"directions[{k}]" for k in range(len(directions))))
            check(lists, names, self.group_N, self.groups)
            self._described, self._table = described, None
        if not params:
            return
        self._check(params, c_KG, len(directions), seed)
        device = params[0].device.type
        if device == "cuda":
            self._on_cuda(lists, c_KG, seed or 0)
        elif device == "cpu":
            self._on_cpu(params, directions, c_KG, seed or 0)
        else:
            raise ValueError(f"tensors are on {device}: only cuda and cpu are supported")

    def _check(self, params: Sequence[Tensor], c_KG: Tensor, directions: int, seed: int | None) -> None:
        if not 1 <= directions <= MOST_DIRECTIONS:
            raise ValueError(f"{directions} directions: 1 to {MOST_DIRECTIONS} are supported")
        if c_KG.shape != (directions, self.groups) or c_KG.dtype is not torch.float32:
            raise ValueError(
                f"coefficients are {tuple(c_KG.shape)} {c_KG.dtype}, not {(directions, self.groups)} fp32 (K, G)"
            )
        if c_KG.device != params[0].device:
            raise ValueError(f"coefficients are on {c_KG.device}, parameters on {params[0].device}")
        if not c_KG.isfinite().all():
            raise ValueError("coefficients are not finite")
        if seed is None and any(x.dtype is torch.bfloat16 for x in params):
            raise ValueError("bf16 parameters are rounded stochastically: a seed is needed")
        if seed is not None and not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"seed {seed} is not in 0..2^63 - 1")

    def _on_cuda(self, lists: Sequence[Sequence[Tensor]], c_KG: Tensor, seed: int) -> None:
        from scale_kernels.delta.triton import TILE, delta_triton

        if self._table is None or not self._table.follow(lists):
            self._table = TensorTable(lists, self.group_N, self.groups, TILE)
        delta_triton(self._table, c_KG.contiguous(), seed)

    def _on_cpu(
        self, params: Sequence[Tensor], directions: Sequence[Sequence[Tensor]], c_KG: Tensor, seed: int
    ) -> None:
        single = [x.dtype is torch.float32 for x in params]
        flat, *along = [[x.view(-1) for x in tensors] for tensors in (params, *directions)]
        sizes = [x.numel() if wide else 0 for x, wide in zip(params, single, strict=True)]
        rows = c_KG.tolist()
        for chunk in chunks_of(sizes, self.group_N):
            pieces = [flat[n][begin:end] for n, begin, end in chunk.pieces]
            for row, tensors in zip(rows, along, strict=True):  # in bf16 the product would be rounded to bf16
                steps = [tensors[n][begin:end].float() for n, begin, end in chunk.pieces]
                torch._foreach_add_(pieces, torch._foreach_mul(steps, row[chunk.group]))
        first_index_N = first_indices([x.numel() for x in params])
        for n in (n for n, wide in enumerate(single) if not wide):
            moved = stepped(params[n], [tensors[n] for tensors in directions], list(c_KG[:, self.group_N[n]].unbind()))
            params[n].copy_(round_stochastic(moved, first_index_N[n], seed))


def delta(
    params: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
    c_KG: Tensor,
    group_N: Sequence[int],
    seed: int | None = None,
) -> None:
    """`DeltaPlan` for a single use."""
    DeltaPlan(group_N, c_KG.shape[-1])(params, directions, c_KG, seed)
