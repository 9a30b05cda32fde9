"""Held-out loss: the same documents every time, never trained on."""

from __future__ import annotations

import math
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
    the first term. Where a term counts nothing there is no loss: NaN over all, and a source is left out."""

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
        ranks = self.strategy.ranks
        dtype = sum_dtype(ranks.device)
        nothing = torch.zeros(len(self.rows), 2, dtype=dtype, device=ranks.device)
        with evaluating(self.root):
            for i, rows in enumerate(self.rows.values()):
                mine = self._share(rows)
                for at in range(0, len(mine), self.micro_rows):
                    batch = self.reader.batch(mine[at : at + self.micro_rows], self.seq_len)
                    loss = self.root({k: v.to(ranks.device) for k, v in batch.items()})
                    for name, term in loss.terms.items():
                        weights[name] = term.weight
                        sums.setdefault(name, nothing.clone())[i] += torch.stack([term.total.to(dtype), term.count])
        weights = _merged(ranks.gather(weights))
        if not weights:
            return Score(math.nan, 0)
        sums_TS2 = ranks.all_sum(torch.stack([sums.get(name, nothing) for name in weights])).cpu()

        def mean(sums_T2: Tensor) -> float:
            """NaN where a term counts nothing."""
            by_term = zip(weights.values(), sums_T2.tolist(), strict=True)
            return sum(weight * total / count if count else math.nan for weight, (total, count) in by_term)

        by_source = {name: mean(sums_TS2[:, i]) for i, name in enumerate(self.rows) if sums_TS2[:, i, 1].all()}
        return Score(mean(sums_TS2.sum(1)), int(sums_TS2[0, :, 1].sum()), by_source)

    def _share(self, rows: list[Row]) -> list[Row]:
        """This rank's rows. All ranks get equally many, as sharded models make their forward passes together: empty rows,
        without a token to score, fill up."""
        ranks = self.strategy.ranks
        each = -(-len(rows) // ranks.world_size)
        mine = rows[ranks.rank :: ranks.world_size]
        return mine + [[] for _ in range(each - len(mine))]


def _merged(by_rank: Sequence[dict[str, float]]) -> dict[str, float]:
    """Names of all ranks, in the order in which the first rank has them: a rank may lack one, or have its own order."""
    merged: dict[str, float] = {}
    for named in by_rank:
        merged = merged | {name: value for name, value in named.items() if name not in merged}
    return merged


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
