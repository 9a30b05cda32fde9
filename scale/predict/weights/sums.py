"""Squared norms and products of lists of shards by kind of weights, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scale_kernels.encode.op import EncodePlan
from torch import Tensor

from scale.parallel.ranks import Ranks
from scale.predict.kinds import KINDS, kind_of
from scale.protocols import Shards

Tensors = Sequence[Tensor]
LARGEST_GRADIENT = 10
"""The one column that is no sum."""


class KindSums:
    """Of shards that keep their shapes. Letters: K numbers of copies (one, but for unusual placements), G kinds, C 12
    columns as in `scale_kernels/encode`."""

    def __init__(self, ranks: Ranks, shards: Shards):
        """Counts the parameters of each kind. Collective."""
        self.ranks = ranks
        self.copies = sorted({shard.copies for shard in shards.values()})
        self._members = [[n for n, s in enumerate(shards.values()) if s.copies == c] for c in self.copies]
        kinds = [kind_of(name) for name in shards]
        self._plans = [EncodePlan([kinds[n] for n in members], len(KINDS)) for members in self._members]
        elements_G = torch.zeros(len(KINDS), dtype=torch.float64)
        for kind, shard in zip(kinds, shards.values(), strict=True):
            elements_G[kind] += shard.param.numel() / shard.copies
        self.elements_G: np.ndarray = ranks.all_sum(elements_G).round().numpy()

    def encode(self, params: Tensors, grads: Tensors | None, drifts: Tensors | None, updates: Tensors | None) -> Tensor:
        """(K, G, C) fp32 of this rank, on the tensors' device, which is not waited for. One launch if K is 1."""
        lists = (params, grads, drifts, updates)
        if len(self._plans) == 1:
            return self._plans[0](*lists).unsqueeze(0)
        return torch.stack([
            plan(*(None if tensors is None else [tensors[n] for n in members] for tensors in lists))
            for plan, members in zip(self._plans, self._members, strict=True)
        ])  # fmt: skip

    def whole(self, tables: Sequence[Tensor]) -> np.ndarray:
        """(M, G, C) fp64 of M tables over all ranks, each element counted once; the same bits on every rank.

        Collective. Waits for the device once.
        """
        here_MKGC = torch.stack(list(tables)).cpu().double()
        copies_K = torch.tensor(self.copies, dtype=torch.float64)
        sums_MGC = (here_MKGC / copies_K[:, None, None]).sum(1)
        largest_WMG = torch.zeros(self.ranks.world_size, *sums_MGC.shape[:2], dtype=torch.float64)
        largest_WMG[self.ranks.rank] = here_MKGC[..., LARGEST_GRADIENT].amax(1)  # a maximum by sums with zeros
        together = self.ranks.all_sum(torch.cat([sums_MGC.flatten(), largest_WMG.flatten()]))
        table_MGC = together[: sums_MGC.numel()].view_as(sums_MGC).clone()
        table_MGC[..., LARGEST_GRADIENT] = together[sums_MGC.numel() :].view_as(largest_WMG).amax(0)
        found: np.ndarray = table_MGC.numpy()
        return found
