"""From the loss sums of packed documents back to the pieces that they came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from scale.data.packing import Row
from scale.data.rows import IGNORE


def span_losses(
    rows: Sequence[Row],
    rank: int,
    world_size: int,
    targets_BL: Tensor,
    segment_BL: Tensor,
    sums: Sequence[Tensor],
    all_sum: Callable[[Tensor], Tensor],
) -> np.ndarray:
    """(N, 2) float64: summed loss and learned tokens of the N spans of a step's `rows`, the same bits on every rank.

    `targets_BL` and `segment_BL` are those of this rank's rows, `sums` their loss sums (b, S), one tensor for each
    micro-batch. Collective.
    """
    share = len(rows) // world_size
    first = sum(len(row) for row in rows[: rank * share])
    segments = int(segment_BL.max()) + 1
    flat_BL = segment_BL + segments * torch.arange(len(segment_BL)).unsqueeze(1)
    learned_BS = (targets_BL != IGNORE).flatten().double()
    count_BS = torch.bincount(flat_BL.flatten(), learned_BS, segments * len(segment_BL)).view(-1, segments)
    sum_rows = [row_S for part_BS in sums for row_S in part_BS.detach().cpu().double()]
    values_N2 = torch.zeros(sum(len(row) for row in rows), 2, dtype=torch.float64)
    at = first
    for row, sum_S, count_S in zip(rows[rank * share :], sum_rows, count_BS, strict=False):
        values_N2[at : at + len(row), 0] = sum_S[: len(row)]
        values_N2[at : at + len(row), 1] = count_S[: len(row)]
        at += len(row)
    return all_sum(values_N2).numpy()


def by_piece(pieces_N: np.ndarray, values_N2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the pieces, each once, and their mean loss per learned token. Pieces without a learned token or with a
    loss that is not finite are left out. A span that reaches into the next piece counts for the one it starts in."""
    pieces, at_N = np.unique(pieces_N, return_inverse=True)
    total, count = (np.bincount(at_N, values_N2[:, column], len(pieces)) for column in (0, 1))
    usable = (count > 0) & np.isfinite(total)
    return pieces[usable], total[usable] / count[usable]
