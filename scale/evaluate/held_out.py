"""Held-out loss: the same documents every time, never trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from scale.data.documents import Documents
from scale.data.packing import Row, Span, best_fit
from scale.data.rows import RowReader
from scale.protocols import Objective, Score, Strategy


class HeldOut:
    """Implements `scale.protocols.Judge`: mean loss per token over up to `tokens` held-out tokens, shared out among the
    sources by weight."""

    def __init__(
        self,
        root: nn.Module,
        objective: Objective,
        strategy: Strategy,
        documents: Sequence[Documents],
        names: Sequence[str],
        weights: Sequence[float],
        tokens: int,
        seq_len: int,
        micro_rows: int,
        cross_documents: bool = False,
    ):
        self.root, self.objective, self.strategy = root, objective, strategy
        self.reader = RowReader(documents, cross_documents)
        self.seq_len, self.micro_rows = seq_len, micro_rows
        share = tokens / sum(weights)
        self.rows = {
            name: held_out_rows(i, documents[i], round(share * weights[i]), seq_len) for i, name in enumerate(names)
        }

    def score(self) -> Score:
        was_training = self.root.training
        self.root.eval()
        sums = torch.zeros(len(self.rows), 2, dtype=torch.float64, device=self.strategy.device)
        with torch.no_grad():
            for i, rows in enumerate(self.rows.values()):
                mine = rows[self.strategy.rank :: self.strategy.world_size]
                for at in range(0, len(mine), self.micro_rows):
                    batch = self.reader.batch(mine[at : at + self.micro_rows], self.seq_len)
                    loss = self.root({k: v.to(self.strategy.device) for k, v in batch.items()})
                    for term in loss.terms.values():
                        sums[i, 0] += term.weight * term.total.double()
                        sums[i, 1] += term.count
        self.root.train(was_training)
        sums = self.strategy.all_sum(sums).cpu()
        by_source = {n: float(s / c) for n, (s, c) in zip(self.rows, sums, strict=True) if c}
        total, count = sums.sum(0).tolist()
        return Score(total / max(count, 1.0), int(count), by_source)


def held_out_rows(source: int, documents: Documents, tokens: int, seq_len: int) -> list[Row]:
    """The first documents of a source up to `tokens` positions, packed; the last one is cut to fit."""
    spans, left = [], tokens
    for doc, length in enumerate(documents.lengths):
        positions = min(int(length) - 1, left)
        if positions > 0:
            spans.append(Span(source, doc, 0, positions))
            left -= positions
        if left <= 0:
            break
    return best_fit(spans, seq_len)
