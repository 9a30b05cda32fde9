"""Losses of documents by forward passes, for those whose loss nobody foresees well."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from scale.data.feedback import span_losses
from scale.data.packing import Span, best_fit
from scale.data.rows import RowReader
from scale.data.selection import pack_weighted
from scale.errors import ScaleError
from scale.models.modes import evaluating
from scale.predict.selection.selector import Probed
from scale.protocols import Strategy


class ForwardProbe:
    """Implements `scale.predict.selection.selector.Probe` with the wrapped `root` of a run, whose objective must tell the
    losses of documents. In evaluation mode; nothing is changed. Spans have at most `seq_len` positions."""

    def __init__(self, root: nn.Module, strategy: Strategy, reader: RowReader, seq_len: int, micro_rows: int):
        self.root, self.strategy, self.reader = root, strategy, reader
        self.seq_len, self.micro_rows = seq_len, micro_rows

    def __call__(self, spans: Sequence[Span]) -> Probed:
        ranks = self.strategy.ranks
        rows, numbers = pack_weighted(best_fit, spans, range(len(spans)), self.seq_len)
        together = ranks.world_size * self.micro_rows  # full micro-batches on every rank: one shape, passes in step
        rows += [[] for _ in range(-len(rows) % together)]
        share = len(rows) // ranks.world_size
        batch = self.reader.batch(rows[ranks.rank * share : (ranks.rank + 1) * share], self.seq_len)
        sums = self._forward(batch)
        values_N2 = span_losses(
            rows, ranks.rank, ranks.world_size, batch["targets"], batch["segment_ids"], sums, ranks.all_sum
        )
        order = np.array([number for row in numbers for number in row], dtype=np.int64)
        losses_N = np.full(len(spans), np.nan)
        learned_N = values_N2[:, 1] > 0
        losses_N[order[learned_N]] = values_N2[learned_N, 0] / values_N2[learned_N, 1]
        return Probed(losses_N, len(sums), sum(span.length for span in spans))

    def _forward(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Loss sums (b, S) of the micro-batches."""
        sums = []
        with evaluating(self.root):
            for at in range(0, len(batch["targets"]), self.micro_rows):
                part = {k: v[at : at + self.micro_rows].to(self.strategy.ranks.device) for k, v in batch.items()}
                segments = self.root(part).per_segment
                if segments is None:
                    raise ScaleError("selection: the objective does not tell the losses of documents")
                sums.append(segments)
        return sums
