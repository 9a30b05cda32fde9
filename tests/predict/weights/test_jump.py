"""Jumps under one process."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch

from scale.parallel.ranks import Ranks
from scale.parallel.single import Single
from scale.predict.kinds import KINDS, kind_of
from scale.predict.weights.jump import Jump
from tests.parallel.lm import digests, meta_model, prepared, whole_loss
from tests.predict.weights.parts import drawn, of_kind, shards_of


@pytest.fixture
def made():
    strategy = Single()
    stepper = prepared(strategy, *meta_model())
    with strategy.edit_masters() as shards:
        rng = torch.Generator().manual_seed(0)
        vectors = [0.01 * torch.randn(s.param.shape, generator=rng) for s in shards.values()]
    return strategy, stepper.root, vectors


def masters(strategy):
    with strategy.edit_masters() as shards:
        return {name: shard.param.clone() for name, shard in shards.items()}


def test_each_kind_moves_by_its_own_coefficient(made):
    strategy, root, vectors = made
    before, loss = masters(strategy), whole_loss(root)
    c_G = [0.5 * g for g in range(len(KINDS))]
    Jump(strategy).apply(vectors, c_G, seed=3)
    for (name, param), vector in zip(masters(strategy).items(), vectors, strict=True):
        torch.testing.assert_close(param, before[name] + c_G[kind_of(name)] * vector)
    assert whole_loss(root) != loss


def test_rollback_restores_every_bit_and_drift_is_the_relative_distance(made):
    strategy, root, vectors = made
    with strategy.edit_masters() as shards:
        next(iter(shards.values())).param.view(-1)[0] = -0.0
    before, loss, first, jump = digests(strategy), whole_loss(root), masters(strategy), Jump(strategy)
    jump.snapshot()
    assert jump.drift() == 0
    jump.apply(vectors, [10.0] * len(KINDS), seed=0)
    far = sum((p - first[name]).double().square().sum() for name, p in masters(strategy).items())
    size = sum(p.double().square().sum() for p in first.values())
    assert jump.drift() == pytest.approx(math.sqrt(far / size), rel=1e-5)
    assert digests(strategy) != before and whole_loss(root) != loss
    jump.rollback()
    assert digests(strategy) == before and whole_loss(root) == loss and jump.drift() == 0


def test_a_later_snapshot_counts(made):
    strategy, _, vectors = made
    jump = Jump(strategy)
    jump.snapshot()
    jump.apply(vectors, [1.0] * len(KINDS), seed=0)
    moved = digests(strategy)
    jump.snapshot()
    jump.apply(vectors, [1.0] * len(KINDS), seed=0)
    jump.rollback()
    assert digests(strategy) == moved


def test_coefficients_that_are_not_finite_move_nothing(made):
    strategy, _, vectors = made
    before = digests(strategy)
    with pytest.raises(ValueError, match="not finite"):
        Jump(strategy).apply(vectors, [math.nan] * len(KINDS), seed=0)
    assert digests(strategy) == before


class Held:
    """Shards of which one is held by two ranks (of whose sums this one alone is there)."""

    def __init__(self):
        self.ranks = Ranks()
        self.shards = shards_of(drawn(0), copies={"model.norm.weight": 2})

    @contextmanager
    def edit_masters(self):
        yield self.shards


def test_copies_count_by_their_share_in_the_distance():
    held = Held()
    jump = Jump(held)
    jump.snapshot()
    jump.apply(list(drawn(1).values()), [1.0] * len(KINDS), seed=0)
    far, size = ([of_kind(t, kind) for kind in KINDS] for t in (drawn(1), drawn(0)))
    share = [0.5 if kind == "norm" else 1.0 for kind in KINDS]
    squares = [sum(w * (x @ x) for w, x in zip(share, xs, strict=True)) for xs in (far, size)]
    assert jump.drift() == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-5)
