import numpy as np
import pytest
import torch
from torch import nn

from scale.data.packing import Span
from scale.data.rows import RowReader
from scale.evaluate.held_out import HeldOut, held_out_rows
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.parallel.single import Single
from scale.protocols import Loss, Score, Term
from tests.data.test_rows import InMemory
from tests.objectives.test_causal_lm import model as llama

RNG = np.random.default_rng(0)
A = InMemory([RNG.integers(3, 32, n) for n in RNG.integers(4, 30, 20)])
B = InMemory([RNG.integers(3, 32, n) for n in RNG.integers(4, 30, 20)])


def judge(tokens, weights=(1.0, 1.0), micro=2):
    strategy = Single()
    root = strategy.prepare(Root(llama(), CausalLM()), None, None)
    return HeldOut(root, strategy, [A, B], ["a", "b"], list(weights), tokens, 32, micro)


def alone(documents, n):
    """Mean loss per token over the first n documents, each by itself."""
    net, sums = llama(), [0.0, 0]
    for doc in range(n):
        row = [Span(0, doc, 0, int(documents.lengths[doc]) - 1)]
        with torch.no_grad():
            term = CausalLM()(net, RowReader([documents]).batch([row], row[0].length)).terms["lm"]
        sums[0] += float(term.total)
        sums[1] += int(term.count)
    return sums[0] / sums[1]


def test_score_is_the_mean_over_tokens_of_every_document_alone():
    score = judge(tokens=10**6).score()
    assert score.by_source["a"] == pytest.approx(alone(A, 20), rel=1e-5)
    assert score.by_source["b"] == pytest.approx(alone(B, 20), rel=1e-5)
    assert score.tokens == A.tokens + B.tokens - 40
    weighted = (score.by_source["a"] * (A.tokens - 20) + score.by_source["b"] * (B.tokens - 20)) / score.tokens
    assert score.loss == pytest.approx(weighted)


def test_the_same_score_every_time_whatever_the_micro_batch():
    assert judge(300, micro=1).score().loss == pytest.approx(judge(300, micro=8).score().loss, rel=1e-6)
    fixed = judge(300)
    assert fixed.score() == fixed.score()


def test_tokens_are_shared_out_by_weight_and_cut_to_fit():
    rows = judge(100, weights=(3.0, 1.0)).rows
    count = {name: sum(s.length for row in rs for s in row) for name, rs in rows.items()}
    assert count == {"a": 75, "b": 25}
    assert sum(s.length for row in held_out_rows(0, A, 10, 32) for s in row) == 10


def test_scoring_leaves_the_training_mode_as_it_was():
    made = judge(50)
    made.root.train()
    made.score()
    assert made.root.training


class Counted(nn.Module):
    """A root whose terms follow from the tokens alone: their sum over tokens (weight 2), and a half per row and 3."""

    def forward(self, batch):
        real = batch["targets"] != -100
        rows = torch.tensor(len(real))
        return Loss(
            {
                "sum": Term((batch["targets"] * real).sum(), real.sum(), weight=2.0),
                "rows": Term(0.5 * rows + 3 * (batch["targets"] * real).sum(), 4 * rows, weight=0.25),
            }
        )


def test_unlike_terms_are_each_divided_by_their_own_count():
    """Two sources, two terms, computed by hand: sum over terms of weight x total / count."""
    # one row each: 3 and 2 positions; the first token of a document is no target
    a, b = InMemory([np.array([9, 1, 2, 3])]), InMemory([np.array([9, 10, 20])])
    made = HeldOut(Counted(), Single(), [a, b], ["a", "b"], [1.0, 1.0], 10**6, 8, 1)
    score = made.score()
    assert score.by_source["a"] == pytest.approx(2 * 6 / 3 + 0.25 * (0.5 + 18) / 4)
    assert score.by_source["b"] == pytest.approx(2 * 30 / 2 + 0.25 * (0.5 + 90) / 4)
    assert score.loss == pytest.approx(2 * 36 / 5 + 0.25 * (1 + 108) / 8)
    assert score.tokens == 5


def test_nothing_to_score():
    assert HeldOut(Counted(), Single(), [InMemory([np.array([5])])], ["a"], [1.0], 10, 8, 1).score() == Score(0.0, 0)
