import numpy as np
import pytest
import torch

from scale.data.packing import Span
from scale.data.rows import IGNORE, RowReader


class InMemory:
    """Documents of given ids; `masks` says which tokens are learned."""

    def __init__(self, docs, masks=None):
        self.docs, self.masks = [np.array(d) for d in docs], masks
        self.lengths = np.array([len(d) for d in docs])
        self.max_id = max(int(d.max()) for d in self.docs)
        self.tokens = int(self.lengths.sum())

    def ids(self, doc, start, stop):
        return self.docs[doc][start:stop]

    def learned(self, doc, start, stop):
        return None if self.masks is None else np.array(self.masks[doc])[start:stop]


def test_tensors_of_a_row_with_two_documents_and_padding():
    reader = RowReader([InMemory([[5, 6, 7, 2], [8, 9, 2]])], pad_id=0)
    batch = reader.batch([[Span(0, 0, 0, 3), Span(0, 1, 0, 2)]], seq_len=7)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0]]
    assert batch["targets"].tolist() == [[6, 7, 2, 9, 2, IGNORE, IGNORE]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2]]


def test_a_piece_in_the_middle_knows_its_last_target():
    batch = RowReader([InMemory([[1, 2, 3, 4, 5]])]).batch([[Span(0, 0, 1, 3)]], seq_len=2)
    assert batch["input_ids"].tolist() == [[2, 3]] and batch["targets"].tolist() == [[3, 4]]


def test_tokens_that_are_not_learned_are_no_targets():
    reader = RowReader([InMemory([[1, 2, 3, 4]], masks=[[False, False, True, False]])])
    assert reader.batch([[Span(0, 0, 0, 3)]], seq_len=3)["targets"].tolist() == [[IGNORE, 3, IGNORE]]


def test_crossing_documents_share_positions_and_segment():
    reader = RowReader([InMemory([[5, 6, 2], [8, 9, 2]])], cross_documents=True)
    batch = reader.batch([[Span(0, 0, 0, 2), Span(0, 1, 0, 2)]], seq_len=5)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert batch["segment_ids"].unique().tolist() == [0]


@pytest.mark.parametrize("name", ["input_ids", "targets", "position_ids", "segment_ids"])
def test_all_tensors_are_int64(name):
    batch = RowReader([InMemory([[5, 6, 2]])]).batch([[Span(0, 0, 0, 2)]], seq_len=4)
    assert batch[name].dtype == torch.int64 and batch[name].shape == (1, 4)
