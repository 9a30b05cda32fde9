"""A small corpus, a source that selects on it, and losses that a pure function makes up."""

from __future__ import annotations

import numpy as np
import torch

from scale.config.predict import SelectionConfig
from scale.data.planner import Planner
from scale.data.rows import IGNORE, RowReader
from scale.data.source import PackedSource
from scale.parallel.ranks import Ranks
from scale.predict.selection.history import Passages
from scale.predict.selection.selector import make_selector
from tests.data.test_rows import InMemory

RNG = np.random.default_rng(0)
DOCUMENTS = [InMemory([RNG.integers(3, 100, n) for n in RNG.integers(2, 90, k)]) for k in (300, 40)]


def alone(*sizes):
    """Sources of so many documents of one piece each."""
    return Passages([np.arange(1, size + 1) for size in sizes])


def selecting(workers=0, ranks=None, lesson=lambda n: 16 if n < 21 else 32, prober=None, **config):
    """Source of two data sources with the selector of a config, at 256 tokens a step."""
    ranks = ranks or Ranks()
    planner = Planner([d.lengths for d in DOCUMENTS], [1.0, 0.5], 256, lesson, 32, seed=3)
    planner.selector = make_selector(
        SelectionConfig(**({"kind": "history", "warmup": 0} | config)), planner.documents, workers, ranks
    )
    if prober is not None:
        planner.selector.probe = prober
    return PackedSource(
        planner, RowReader(DOCUMENTS), ["a", "b"], 64, [16, 32], ranks.rank, ranks.world_size, workers,
        all_sum=ranks.all_sum,
    )  # fmt: skip


def losses(batch, step):
    """(B, S) made-up loss sums: each token has its own, and all fall while training goes on."""
    targets = batch["targets"]
    loss = torch.where(targets == IGNORE, 0.0, (targets * 37 % 11).float() / (1 + 0.02 * step * (targets % 5)))
    segments = int(batch["segment_ids"].max()) + 1
    return torch.zeros(len(targets), segments).scatter_add(1, batch["segment_ids"], loss)


def step(source, number):
    """Draw a group and tell its losses."""
    group = source.draw()
    group.hear([losses(batch, number) for batch in group.batches])
    return group


def steps(source, first, last):
    return [step(source, number) for number in range(first, last)]


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x.tokens, x.seq_len, x.sources, len(x.batches)) == (y.tokens, y.seq_len, y.sources, len(y.batches))
        for p, q in zip(x.batches, y.batches, strict=True):
            assert p.keys() == q.keys() and all(torch.equal(p[k], q[k]) for k in p)
