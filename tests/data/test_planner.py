import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from scale.data.planner import Planner


def planner(lengths=None, weights=(1.0,), seq_len=lambda n: 64, tokens=512, packing="best-fit", seed=0):
    if lengths is None:
        lengths = [np.random.default_rng(5).integers(2, 200, 400)]
    return Planner(lengths, weights, tokens, seq_len, 64, packing, seed)


def test_a_plan_has_the_rows_of_one_step():
    plan = planner().next()
    assert len(plan.rows) == 8 and plan.seq_len == 64
    assert plan.drawn == (sum(s.length for row in plan.rows for s in row),)


@pytest.mark.parametrize("packing", ["best-fit", "concat"])
def test_restoring_a_snapshot_through_json_gives_the_same_stream(packing):
    lesson = lambda n: 16 if n < 9 else 64  # noqa: E731
    first = planner(seq_len=lesson, packing=packing)
    for _ in range(5):
        first.next()
    saved = json.loads(json.dumps(first.snapshot()))
    second = planner(seq_len=lesson, packing=packing)
    second.restore(saved)
    assert [first.next() for _ in range(40)] == [second.next() for _ in range(40)]


def test_snapshots_do_not_change_afterwards():
    stream = planner()
    stream.next()
    saved = stream.snapshot()
    before = json.dumps(saved)
    for _ in range(50):
        stream.next()
    assert json.dumps(saved) == before


def test_an_epoch_visits_every_position_once_even_when_the_length_changes_on_the_way():
    lengths = np.random.default_rng(1).integers(2, 300, 500)
    stream = planner([lengths], seq_len=lambda n: (16, 32, 64)[min(n // 7, 2)], tokens=256)
    seen = Counter()
    every = {(doc, p) for doc, n in enumerate(lengths) for p in range(n - 1)}
    while len(seen) < len(every):
        rows = [row for row in stream.next().rows]
        new = Counter((s.doc, p) for row in rows for s in row for p in range(s.start, s.stop))
        repeated = [key for key in new if key in seen]
        assert not repeated or len(seen | new) == len(every)  # only the last step reaches into the next epoch
        seen |= new
    assert set(seen) == every


def test_epochs_have_different_orders_and_seeds_too():
    lengths = [np.full(64, 65)]
    a, b, other = (planner(lengths, tokens=64 * 64, seed=s) for s in (0, 0, 1))
    first = [s.doc for row in a.next().rows for s in row]
    assert first == [s.doc for row in b.next().rows for s in row]
    assert first != [s.doc for row in other.next().rows for s in row]
    assert sorted(first) == list(range(64)) and first != list(range(64))


def test_sources_are_mixed_by_weight_in_tokens_whatever_their_document_lengths():
    rng = np.random.default_rng(2)
    stream = planner([rng.integers(500, 900, 40), rng.integers(2, 9, 3000)], weights=(1.0, 3.0), tokens=4096)
    shares = []
    for _ in range(30):
        drawn = stream.next().drawn
        shares.append(drawn[1] / sum(drawn))
    assert shares[-1] == pytest.approx(0.75, abs=0.01)


def test_single_token_documents_are_passed_over():
    stream = planner([np.array([1, 1, 5, 1])], tokens=64)
    assert {s.doc for _ in range(3) for row in stream.next().rows for s in row} == {2}


def test_rows_are_shuffled():
    fills = [sum(s.length for s in row) for row in planner(tokens=64 * 256).next().rows]
    longest = [max(s.length for s in row) for row in planner(tokens=64 * 256).next().rows]
    assert any(a < b for a, b in pairwise(longest)) and np.mean(fills) > 0.97 * 64


@pytest.mark.parametrize(("packing", "share"), [("best-fit", 40 / 64), ("concat", 16400 / (257 * 64))])
def test_fill_is_the_share_of_positions_that_train(packing, share):
    """41 tokens are 40 positions, and two such documents do not fit into 64: a row each. A stream has a gap only at the
    end of a window: 410 documents reach 256 rows of 64, and a 257th takes what is over."""
    stream = planner([np.full(4096, 41)], packing=packing)
    before = stream.snapshot()
    assert stream.fill() == pytest.approx(share, abs=1e-9)
    assert stream.snapshot() == before


def test_fill_foretells_what_the_steps_of_an_epoch_train():
    lengths = np.random.default_rng(3).integers(2, 90, 3000)
    stream = planner([lengths], tokens=64 * 64)
    fill = stream.fill(groups=25)
    assert fill == planner([lengths], tokens=64 * 64).fill(groups=25)
    plans = [stream.next() for _ in range(25)]
    assert fill == pytest.approx(sum(p.tokens for p in plans) / (25 * 64 * 64), abs=0.01)
    assert fill == stream.fill(groups=25)  # wherever the planner stands
