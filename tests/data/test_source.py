import gc
import json
import multiprocessing

import numpy as np
import pytest
import torch

from scale.data.planner import Planner
from scale.data.rows import RowReader
from scale.data.source import PackedSource
from tests.data.test_rows import InMemory

RNG = np.random.default_rng(0)
DOCUMENTS = InMemory([RNG.integers(3, 100, n) for n in RNG.integers(2, 90, 300)])


def lesson(n):
    return 16 if n < 6 else 32


def source(workers=0, rank=0, world_size=1):
    planner = Planner([DOCUMENTS.lengths], [1.0], 256, lesson, 32, seed=3)
    reader = RowReader([DOCUMENTS])
    return PackedSource(planner, reader, ["docs"], 64, [16, 32], rank, world_size, workers)


def draw(stream, n):
    return [stream.draw() for _ in range(n)]


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x.tokens, x.seq_len, x.sources, len(x.batches)) == (y.tokens, y.seq_len, y.sources, len(y.batches))
        for p, q in zip(x.batches, y.batches, strict=True):
            assert all(torch.equal(p[k], q[k]) for k in p)


def test_a_group_keeps_its_tokens_constant_while_rows_grow():
    groups = draw(source(), 12)
    assert {(g.seq_len, sum(len(b["targets"]) for b in g.batches)) for g in groups} == {(16, 16), (32, 8)}
    assert {len(b["targets"]) * g.seq_len for g in groups for b in g.batches} == {64}


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_a_batch(workers):
    same(draw(source(), 15), draw(source(workers), 15))


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 3)])
def test_resume_is_exact_for_any_number_of_workers(before, after):
    whole = draw(source(), 20)
    first = source(before)
    draw(first, 7)
    state = json.loads(json.dumps(first.state_dict()))
    second = source(after)
    second.load_state_dict(state)
    same(whole[7:], draw(second, 13))


def test_state_is_that_of_the_last_group_drawn_not_of_the_workers():
    ahead, lazy = source(3), source(0)
    draw(ahead, 4), draw(lazy, 4)
    assert ahead.state_dict() == lazy.state_dict()


def test_workers_end_with_their_source():
    before = {p.pid for p in multiprocessing.active_children()}
    stream = source(2)
    stream.draw()
    workers = [p for p in multiprocessing.active_children() if p.pid not in before]
    assert len(workers) == 2
    del stream
    gc.collect()
    assert not any(p.is_alive() for p in workers)


def test_ranks_get_different_rows_that_make_up_the_whole():
    whole = source().draw()
    parts = [source(rank=r, world_size=2).draw() for r in (0, 1)]
    rows = torch.cat([b["input_ids"] for b in whole.batches])
    halves = [torch.cat([b["input_ids"] for b in p.batches]) for p in parts]
    assert torch.equal(torch.cat(halves), rows) and not torch.equal(*halves)


def test_drawing_and_rehearsing_leave_the_global_rng_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stream = source(2)
    stream.rehearse()
    draw(stream, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_rehearsal_shows_every_length_still_to_come_and_takes_nothing():
    stream = source()
    assert [b["targets"].shape for b in stream.rehearse().batches] == [(4, 16), (2, 32)]
    same(draw(stream, 3), draw(source(), 3))
    draw(stream, 4)
    assert [b["targets"].shape for b in stream.rehearse().batches] == [(2, 32)]
