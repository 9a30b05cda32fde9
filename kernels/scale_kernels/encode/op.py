"""Chooses: Triton on CUDA, cache-sized chunks on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from scale_kernels.encode.cpu import CpuEncoder
from scale_kernels.tensor_table import TensorTable, check, describe, given

NAMES = ("params", "grads", "drifts", "updates")
MOST_GROUPS = 16


class EncodePlan:
    """Statistics of tensors that keep their shapes: what depends on shapes and addresses is built once.

    `group_N` says the group of each tensor, 0 <= id < `groups` <= 16.
    """

    def __init__(self, group_N: Sequence[int], groups: int) -> None:
        if not 1 <= groups <= MOST_GROUPS:
            raise ValueError(f"{groups} groups: 1 to {MOST_GROUPS} are supported")
        self.group_N = list(group_N)
        self.groups = groups
        self._described: list | None = None
        self._table: TensorTable | None = None
        self._encoder: CpuEncoder | None = None

    def __call__(
        self,
        params: Sequence[Tensor] | None,
        grads: Sequence[Tensor] | None,
        drifts: Sequence[Tensor] | None,
        updates: Sequence[Tensor] | None,
    ) -> Tensor:
        """(G, 12) fp32 on the tensors' device, columns `reference.COLUMNS`; bit for bit the same for the same input.

        Lists of fp32 or bf16 tensors, contiguous, of the same shapes; None counts as zeros. Raises ValueError where that
        does not hold.
        """
        lists = (params, grads, drifts, updates)
        if (described := describe(lists)) != self._described:
            check(lists, NAMES, self.group_N, self.groups)
            self._described, self._table, self._encoder = described, None, None
        first = next(tensors for tensors in lists if tensors is not None)
        device = first[0].device.type if first else "cpu"
        if device == "cuda":
            return self._on_cuda(lists)
        if device == "cpu":
            self._encoder = self._encoder or CpuEncoder([x.numel() for x in first], self.group_N, self.groups)
            return self._encoder(lists)
        raise ValueError(f"tensors are on {device}: only cuda and cpu are supported")

    def _on_cuda(self, lists: Sequence[Sequence[Tensor] | None]) -> Tensor:
        from scale_kernels.encode.triton import TILE, encode_triton

        if self._table is None or not self._table.follow(lists):
            self._table = TensorTable(lists, self.group_N, self.groups, TILE)
        return encode_triton(self._table, given(lists), self.groups)


def encode(
    params: Sequence[Tensor] | None,
    grads: Sequence[Tensor] | None,
    drifts: Sequence[Tensor] | None,
    updates: Sequence[Tensor] | None,
    group_N: Sequence[int],
    groups: int,
) -> Tensor:
    """`EncodePlan` for a single use."""
    return EncodePlan(group_N, groups)(params, grads, drifts, updates)
