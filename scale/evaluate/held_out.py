"""Held-out loss: the same documents every time, never trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scale.data.documents import Documents
from scale.data.packing import Row, Span, best_fit
from scale.data.rows import RowReader
from scale.hardware import sum_dtype
from scale.models.modes import evaluating
from scale.protocols import Score, Strategy


class HeldOut:
    """Implements `scale.protocols.Judge`: loss over up to `tokens` held-out tokens, shared out among the sources by weight.

    As in training, each term of the loss is divided by its own count, then weighted. A score's `tokens` is the count of
    the first term."""

    def __init__(
        self,
        root: nn.Module,
        strategy: Strategy,
        documents: Sequence[Documents],
        names: Sequence[str],
        weights: Sequence[float],
        tokens: int,
        seq_len: int,
        micro_rows: int,
        cross_documents: bool = False,
    ):
        self.root, self.strategy = root, strategy
        self.reader = RowReader(documents, cross_documents)
        self.seq_len, self.micro_rows = seq_len, micro_rows
        share = tokens / sum(weights)
        self.rows = {
            name: held_out_rows(i, documents[i], round(share * weights[i]), seq_len) for i, name in enumerate(names)
        }

    def score(self) -> Score:
        sums: dict[str, Tensor] = {}  # of each term, by source: total and count
        weights: dict[str, float] = {}
        dtype = sum_dtype(self.strategy.ranks.device)
        nothing = torch.zeros(len(self.rows), 2, dtype=dtype, device=self.strategy.ranks.device)
        with evaluating(self.root):
            for i, rows in enumerate(self.rows.values()):
                mine = self._share(rows)
                for at in range(0, len(mine), self.micro_rows):
                    batch = self.reader.batch(mine[at : at + self.micro_rows], self.seq_len)
                    loss = self.root({k: v.to(self.strategy.ranks.device) for k, v in batch.items()})
                    for name, term in loss.terms.items():
                        weights[name] = term.weight
                        sums.setdefault(name, nothing.clone())[i] += torch.stack([term.total.to(dtype), term.count])
        if not sums:
            return Score(0.0, 0)
        sums_TS2 = self.strategy.ranks.all_sum(torch.stack(list(sums.values()))).cpu()

        def mean(sums_T2: Tensor) -> float:
            by_term = zip(weights.values(), sums_T2.tolist(), strict=True)
            return sum(weight * total / max(count, 1.0) for weight, (total, count) in by_term)

        by_source = {name: mean(sums_TS2[:, i]) for i, name in enumerate(self.rows) if sums_TS2[:, i, 1].any()}
        return Score(mean(sums_TS2.sum(1)), int(sums_TS2[0, :, 1].sum()), by_source)

    def _share(self, rows: list[Row]) -> list[Row]:
        """This rank's rows. All ranks get equally many, as sharded models make their forward passes together: empty rows,
        without a token to score, fill up."""
        ranks = self.strategy.ranks
        each = -(-len(rows) // ranks.world_size)
        mine = rows[ranks.rank :: ranks.world_size]
        return mine + [[] for _ in range(each - len(mine))]


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
