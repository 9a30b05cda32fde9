import math
from types import SimpleNamespace

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
from tests.distributed.harness import run_ranks
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


def undefined(score):
    return math.isnan(score.loss), score.tokens, score.by_source


def test_nothing_to_score_has_no_loss():
    empty = InMemory([np.array([5])])
    assert undefined(HeldOut(Counted(), Single(), [empty], ["a"], [1.0], 10, 8, 1).score()) == (True, 0, {})


class Masked(Counted):
    """Learns only tokens above `above`; also a term of a kind that documents with tokens above 50 alone have."""

    def __init__(self, above, kinds=False):
        super().__init__()
        self.above, self.kinds = above, kinds

    def forward(self, batch):
        learned = (batch["targets"] != -100) & (batch["targets"] > self.above)
        terms = {"lm": Term((batch["targets"] * learned).sum(), learned.sum())}
        if self.kinds:
            high = batch["targets"] > 50
            terms["high"] = Term((batch["targets"] * high).sum(), high.sum())
        return Loss(terms)


def test_a_source_without_a_scored_token_has_no_loss_and_all_of_them_have_none():
    a, b = InMemory([np.array([9, 1, 2, 3])]), InMemory([np.array([9, 10, 20])])
    make = lambda root: HeldOut(root, Single(), [a, b], ["a", "b"], [1.0, 1.0], 10**6, 8, 1)  # noqa: E731
    assert make(Masked(5)).score() == Score(15.0, 2, {"b": 15.0})
    assert undefined(make(Masked(1000)).score()) == (True, 0, {})
    assert undefined(make(Masked(5, kinds=True)).score()) == (True, 2, {}), "no part of the loss is left out"


class OfRank(nn.Module):
    """Terms of a rank in an order of its own: the second rank lacks `rare`."""

    def __init__(self, rank, above=0):
        super().__init__()
        self.rank, self.above = rank, above

    def forward(self, batch):
        real = (batch["targets"] != -100) & (batch["targets"] > self.above)
        total = (batch["targets"] * real).sum()
        terms = {
            "sum": Term(total, real.sum(), weight=2.0),
            "rows": Term(3 * total, 4 * torch.tensor(len(real))),
            "rare": Term(total, real.sum(), weight=0.5),
        }
        names = ["sum", "rare", "rows"] if self.rank == 0 else ["rows", "sum"]
        return Loss({name: terms[name] for name in names})


def score_of_ranks(ranks):
    """A source of two rows for each rank; nothing scored at all."""
    documents = InMemory([np.array([9, 1, 2, 3]), np.array([9, 10, 20, 30]), np.array([9, 7, 7, 7])])
    strategy = SimpleNamespace(ranks=ranks)
    out = []
    for above in (0, 1000):
        root = OfRank(ranks.rank, above)
        made = HeldOut(root, strategy, [documents], ["a"], [1.0], 10**6, 3, 1)
        score = made.score()
        mine = [int(t) for row in made._share(made.rows["a"]) for t in made.reader.batch([row], 3)["targets"].flatten()]
        out.append([score.loss if score.tokens else str(score.loss), score.tokens, score.by_source, mine])
    return out


def test_ranks_add_up_terms_by_name():
    (first, empty), (second, also) = run_ranks("tests.evaluate.test_held_out:score_of_ranks")
    mine, theirs = ([token for token in one[3] if token > 0] for one in (first, second))
    everything = sum(mine) + sum(theirs)
    expected = 2 * everything / 9 + 3 * everything / (4 * 4) + 0.5 * sum(mine) / len(mine)
    assert first[:3] == second[:3] == [pytest.approx(expected), 9, {"a": pytest.approx(expected)}]
    assert empty[:3] == also[:3] == ["nan", 0, {}]
