import numpy as np
import pytest
import torch

from scale.data.feedback import by_piece, span_losses
from scale.data.packing import Span
from scale.data.rows import IGNORE, RowReader
from tests.data.test_rows import InMemory

DOCS = InMemory([[5, 6, 7, 2], [8, 9, 2], [4, 4, 4, 4, 2]], [[1, 1, 0, 1], [1, 1, 1], [1, 0, 0, 0, 0]])
ROWS = [[Span(0, 0, 0, 3), Span(0, 1, 0, 2)], [Span(0, 2, 0, 4)], [], [Span(0, 1, 0, 1)]]


def told(rows, segments):
    """The loss of a token is its id."""
    batch = RowReader([DOCS]).batch(rows, 6)
    loss = torch.where(batch["targets"] == IGNORE, 0, batch["targets"]).float()
    return batch, torch.zeros(len(rows), segments).scatter_add(1, batch["segment_ids"], loss)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_losses_of_spans_by_hand(micro):
    batch, _ = told(ROWS, 3)
    sums = [told(ROWS[i : i + micro], 3)[1] for i in range(0, 4, micro)]
    values = span_losses(ROWS, 0, 1, batch["targets"], batch["segment_ids"], sums, lambda v: v)
    assert values.tolist() == [[6 + 2, 2], [9 + 2, 2], [0, 0], [9, 1]]


def test_the_parts_of_two_ranks_are_put_in_their_places():
    parts = []
    for rank in (0, 1):
        batch, sums = told(ROWS[2 * rank : 2 * rank + 2], 3)
        parts.append(span_losses(ROWS, rank, 2, batch["targets"], batch["segment_ids"], [sums], lambda v: v))
    assert sum(parts).tolist() == [[8, 2], [11, 2], [0, 0], [9, 1]] and parts[1][:3].tolist() == [[0, 0]] * 3


def test_spans_of_a_piece_make_one_mean_and_what_says_nothing_is_left_out():
    values = np.array([[8.0, 2.0], [1.0, 1.0], [0.0, 0.0], [np.nan, 3.0], [9.0, 1.0]])
    pieces, losses = by_piece(np.array([7, 2, 3, 4, 7]), values)
    assert pieces.tolist() == [2, 7] and losses.tolist() == [1.0, 17 / 3]
