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


class RowReader:
    """Reads the tokens of planned rows. Picklable, stateless: any worker may read any row.

    With `cross_documents` positions run through the whole row and all of it is one segment; otherwise each span counts
    from 0, which is how the attention mask of Hugging Face models tells packed documents apart.
    """

    def __init__(self, documents: Sequence[Documents], cross_documents: bool = False, pad_id: int = 0):
        self.documents, self.cross_documents, self.pad_id = documents, cross_documents, pad_id

    def batch(self, rows: Sequence[Row], seq_len: int) -> dict[str, Tensor]:
        """int64 tensors (B, L): input_ids, targets (already shifted; -100 = not learned), position_ids, segment_ids."""
        shape_BL = (len(rows), seq_len)
        input_BL = np.full(shape_BL, self.pad_id, dtype=np.int64)
        targets_BL = np.full(shape_BL, IGNORE, dtype=np.int64)
        position_BL = np.zeros(shape_BL, dtype=np.int64)
        segment_BL = np.zeros(shape_BL, dtype=np.int64)
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
                at = end
            position_BL[b, at:] = np.arange(seq_len - at)  # padding is a segment of its own
            segment_BL[b, at:] = len(row)
        if self.cross_documents:
            position_BL[:] = np.arange(seq_len)
            segment_BL[:] = 0
        named = {"input_ids": input_BL, "targets": targets_BL, "position_ids": position_BL, "segment_ids": segment_BL}
        return {name: torch.from_numpy(array) for name, array in named.items()}
