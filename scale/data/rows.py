"""Rows of spans -> tensors. B rows, L positions per row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scale.data.documents import Documents
from scale.data.packing import Row

IGNORE = -100
"""Target of a position that is not learned."""

NAMES = ("input_ids", "targets", "position_ids", "segment_ids")
WEIGHTS = "weights"
"""Name of the weights (B, L) of tokens in the loss, float32, where a selector asks for them."""


class RowReader:
    """Reads the tokens of planned rows. Picklable, stateless: any worker may read any row.

    With `cross_documents` positions run through the whole row and all of it is one segment; otherwise each span counts
    from 0, which is how the attention mask of Hugging Face models tells packed documents apart.
    """

    def __init__(self, documents: Sequence[Documents], cross_documents: bool = False, pad_id: int = 0):
        self.documents, self.cross_documents, self.pad_id = documents, cross_documents, pad_id

    def block(self, rows: Sequence[Row], seq_len: int, weights: Sequence[Sequence[float]] = ()) -> Tensor:
        """All tensors of some rows in one, int64 (4, B, L) in the order of `NAMES`: one piece of shared memory to pass.

        With `weights`, one for each span, a fifth plane holds those of the tokens: the bits of float64.
        """
        block_4BL = np.zeros((len(NAMES) + bool(weights), len(rows), seq_len), dtype=np.int64)
        input_BL, targets_BL, position_BL, segment_BL = block_4BL[: len(NAMES)]
        input_BL[:], targets_BL[:] = self.pad_id, IGNORE
        for b, row in enumerate(rows):
            at = 0
            for s, span in enumerate(row):
                end = at + span.length
                ids = self.documents[span.source].ids(span.doc, span.start, span.stop + 1)
                learned = self.documents[span.source].learned(span.doc, span.start + 1, span.stop + 1)
                input_BL[b, at:end] = ids[:-1]
                targets_BL[b, at:end] = ids[1:] if learned is None else np.where(learned, ids[1:], IGNORE)
                position_BL[b, at:end] = np.arange(span.length)
                segment_BL[b, at:end] = s
                if weights:
                    block_4BL[-1].view(np.float64)[b, at:end] = weights[b][s]
                at = end
            position_BL[b, at:] = np.arange(seq_len - at)  # padding is a segment of its own
            segment_BL[b, at:] = len(row)
        if self.cross_documents:
            position_BL[:] = np.arange(seq_len)
            segment_BL[:] = 0
        return torch.from_numpy(block_4BL)

    def batch(self, rows: Sequence[Row], seq_len: int) -> dict[str, Tensor]:
        """int64 tensors (B, L): input_ids, targets (already shifted; -100 = not learned), position_ids, segment_ids."""
        return unstack(self.block(rows, seq_len))


def unstack(block_4BL: Tensor) -> dict[str, Tensor]:
    """The named tensors of a block, as views (weights as float32)."""
    named = dict(zip(NAMES, block_4BL[: len(NAMES)], strict=True))
    if len(block_4BL) > len(NAMES):
        named[WEIGHTS] = block_4BL[-1].view(torch.float64).float()
    return named
