import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch

from scale.data import planner as planning
from scale.data.packing import Span, best_fit, concat
from scale.data.planner import Planner
from scale.data.rows import RowReader, unstack
from scale.data.selection import FLOOR, best, inclusion, pack_weighted, rejoin_weighted, systematic
from scale.data.source import PackedSource
from scale.errors import UsageError
from tests.data.test_rows import InMemory


class ByNumber:
    """Selector: odd documents are worth more than even ones, and more the higher their number."""

    def __init__(self, keep=0.5, unbiased=False):
        self.kept, self.unbiased, self.asked = keep, unbiased, []

    def keep(self, group):
        return self.kept

    def scores(self, group, spans, pieces_N):
        self.asked.append((group, list(spans), pieces_N))
        return np.array([span.doc + 1e6 * (span.doc % 2) for span in spans])

    def hear(self, group, pieces_N, losses_N):
        pass

    def state_dict(self, drawn):
        return {}

    def load_state_dict(self, state):
        pass


def planner(lengths, selector=None, weights=None, tokens=512, seq_len=lambda n: 64, packing="best-fit", seed=0):
    made = Planner(lengths, weights or [1.0] * len(lengths), tokens, seq_len, 64, packing, seed)
    made.selector = selector
    return made


def spans_of(plan):
    return [span for row in plan.rows for span in row]


@pytest.mark.parametrize(
    ("packing", "digest"),
    [
        ("best-fit", "37ac3c43609bcbb4a5768c7e95a49fcf8f5672964d0e41f843b29e5d527f8f6f"),
        ("concat", "96e12a52a4584983ba08f11abeadcc5d2dba0b13378d3a657ff8a0c371b73703"),
    ],
)
def test_without_selection_batches_and_states_are_those_of_before_there_was_any(packing, digest):
    """Digests written down before selection was built."""
    rng = np.random.default_rng(11)
    docs = [InMemory([rng.integers(3, 100, n) for n in rng.integers(2, 90, k)]) for k in (120, 15)]
    made = Planner([d.lengths for d in docs], [1.0, 0.5], 256, lambda n: 16 if n < 9 else 32, 32, packing, seed=3)
    source = PackedSource(made, RowReader(docs), ["a", "b"], 64, [16, 32])
    found = hashlib.sha256()
    for _ in range(60):
        group = source.draw()
        assert group.hear is None
        for batch in group.batches:
            found.update(",".join(batch).encode())
            for tensor in batch.values():
                found.update(tensor.numpy().tobytes())
        found.update(json.dumps([group.tokens, group.sources, source.state_dict()]).encode())
    assert found.hexdigest() == digest


def test_the_best_up_to_a_budget_by_hand():
    scores = np.array([1.0, 5.0, np.inf, 5.0, 4.0])
    lengths = np.array([10, 10, 10, 10, 10])
    assert best(scores, lengths, 30).tolist() == [1, 2, 3]
    assert best(scores, lengths, 15).tolist() == [1, 2]  # the last one may go over; of equals the earlier one
    assert best(scores, lengths, 0).tolist() == []


def test_inclusion_probabilities_by_hand():
    """Sizes .2 + .8 x score / 2 are .2, .6, 1, 1, 2.2 (mean 1) and 2 of 5 are kept: .4 x size."""
    p = inclusion(np.array([0.0, 1.0, 2.0, 2.0, 5.0]), np.ones(5), 0.4)
    assert FLOOR == 0.2 and p == pytest.approx([0.08, 0.24, 0.4, 0.4, 0.88])


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.95, 1.0])
def test_inclusion_keeps_its_share_and_never_exceeds_one(keep):
    rng = np.random.default_rng(0)
    scores, lengths = rng.exponential(1.0, 200) ** 3, rng.integers(1, 60, 200)
    scores[:5] = np.inf
    p = inclusion(scores, lengths, keep)
    assert p.max() <= 1 and (p * lengths).sum() == pytest.approx(keep * lengths.sum())
    assert np.all(p[:5] == p.max()) and np.all(keep / p < 1 / FLOOR + 1e-9)


def test_systematic_sampling_has_exact_probabilities_and_a_steady_size():
    p = np.array([0.08, 0.24, 0.4, 0.4, 0.88, 1.0])
    starts = (np.arange(20000) + 0.5) / 20000
    picked = [systematic(p, u) for u in starts]
    counts = np.bincount(np.concatenate(picked), minlength=6) / len(starts)
    assert counts == pytest.approx(p, abs=1e-3)
    assert {len(one) for one in picked} == {3}  # the probabilities add up to 3


@pytest.mark.parametrize("pack", [best_fit, concat])
def test_weights_follow_their_spans_through_packing_and_back(pack):
    spans = [Span(0, 3, 0, 50), Span(1, 3, 0, 30), Span(0, 3, 0, 50)]
    rows, weights = pack_weighted(pack, spans, [2.0, 3.0, 5.0], 16)
    total = Counter()
    for row, row_weights in zip(rows, weights, strict=True):
        assert sum(s.length for s in row) <= 16
        for span, weight in zip(row, row_weights, strict=True):
            total[span.source, weight] += span.length
    assert total == {(0, 2.0): 50, (1, 3.0): 30, (0, 5.0): 50}
    joined = sorted(zip(*rejoin_weighted(rows, weights), strict=True), key=lambda pair: pair[1])
    assert joined == [(spans[0], 2.0), (spans[1], 3.0), (spans[2], 5.0)]


def test_a_window_keeps_the_best_half_and_nothing_else():
    """64 documents of a row each are looked at, one step takes all 32 that are kept."""
    chooser = ByNumber()
    lengths = [np.full(64, 65)]
    made = planner(lengths, chooser, tokens=32 * 64)
    plan = made.next()
    assert sorted(s.doc for s in spans_of(plan)) == list(range(1, 64, 2))
    assert chooser.asked[0][0] == 0 and sorted(chooser.asked[0][2]) == list(range(64))
    assert made.passed_over == [32] and made.taken[0] - made.kept[0] == 32 * 64 and plan.weights == []


def test_windows_are_as_large_as_without_selection(monkeypatch):
    monkeypatch.setattr(planning, "WINDOW_ROWS", 32)
    chooser = ByNumber(keep=0.25)
    made = planner([np.full(4096, 65)], chooser)
    for _ in range(8):
        made.next()
    assert [len(spans) for _, spans, _ in chooser.asked] == [128, 128] and [g for g, *_ in chooser.asked] == [0, 4]


def test_each_source_gives_the_same_share_so_that_the_mix_stays():
    rng = np.random.default_rng(2)
    lengths = [rng.integers(30, 60, 2000), rng.integers(2, 9, 30000)]
    for unbiased in (False, True):
        made = planner(lengths, ByNumber(0.3, unbiased), weights=[1.0, 3.0], tokens=4096)
        for _ in range(40):
            drawn = made.next().drawn
        assert drawn[1] / sum(drawn) == pytest.approx(0.75, abs=0.02)
        assert [k / t for k, t in zip(made.kept, made.taken, strict=True)] == pytest.approx([0.3, 0.3], abs=0.01)


def test_pieces_have_one_number_each_through_all_sources():
    lengths = [np.array([200, 1, 65, 66]), np.array([3, 130])]
    made = planner(lengths)
    every = [made.orders[i].span(0, place) for i in (0, 1) for place in range(made.orders[i].size)]
    assert [last.tolist() for last in made.documents] == [[4, 4, 5, 7], [1, 4]] and sorted(made.pieces(every)) == list(
        range(11)
    )
    assert made.pieces([Span(0, 0, 128, 130), Span(1, 1, 70, 80), Span(0, 3, 0, 9)]).tolist() == [2, 9, 5]


@pytest.mark.parametrize("packing", ["best-fit", "concat"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_every_chosen_position_comes_once_when_the_length_changes_on_the_way(packing, unbiased, monkeypatch):
    monkeypatch.setattr(planning, "WINDOW_ROWS", 16)
    lengths = np.random.default_rng(1).integers(2, 300, 400)
    made = planner([lengths], ByNumber(0.5, unbiased), None, 256, lambda n: (16, 32, 64)[min(n // 7, 2)], packing)
    seen = Counter()
    while made.epoch[0] == 0:
        plan = made.next()
        for s in spans_of(plan):
            seen.update((s.doc, p) for p in range(s.start, s.stop))
        if unbiased:
            assert [len(w) for w in plan.weights] == [len(r) for r in plan.rows]
    repeated = sum(n > 1 for n in seen.values())
    assert repeated <= 256  # what the last step took from the second epoch
    positions = int((lengths - 1).sum())
    assert len(seen) == pytest.approx(positions / 2, rel=0.1)


@pytest.mark.parametrize("unbiased", [False, True])
def test_restoring_a_snapshot_through_json_gives_the_same_stream(unbiased, monkeypatch):
    monkeypatch.setattr(planning, "WINDOW_ROWS", 16)
    lesson = lambda n: 16 if n < 9 else 64  # noqa: E731
    lengths = [np.random.default_rng(5).integers(2, 200, 400)]
    first = planner(lengths, ByNumber(0.4, unbiased), seq_len=lesson)
    for _ in range(7):
        first.next()
    saved = json.loads(json.dumps(first.snapshot()))
    second = planner(lengths, ByNumber(0.4, unbiased), seq_len=lesson)
    second.restore(saved)
    assert [first.next() for _ in range(40)] == [second.next() for _ in range(40)]
    assert first.snapshot() == second.snapshot()


def test_weights_of_tokens_are_those_of_their_document():
    reader = RowReader([InMemory([[5, 6, 7, 2], [8, 9, 2]])])
    block = reader.block([[Span(0, 0, 0, 3), Span(0, 1, 0, 2)]], 6, [[0.5, 4.0]])
    named = unstack(block)
    assert named["weights"].dtype == torch.float32 and named["weights"].tolist() == [[0.5] * 3 + [4.0] * 2 + [0.0]]
    plain = reader.batch([[Span(0, 0, 0, 3), Span(0, 1, 0, 2)]], 6)
    assert all(torch.equal(named[k], plain[k]) for k in plain) and "weights" not in plain


def source(cross=False, workers=0, selector=None):
    docs = InMemory([np.arange(3, 40)] * 50)
    return PackedSource(planner([docs.lengths], selector), RowReader([docs], cross), ["a"], 64, [64], workers=workers)


def test_what_makes_no_sense_is_refused_in_one_line():
    with pytest.raises(UsageError, match="cross_documents = true: selection has no documents to tell apart"):
        source(cross=True, selector=ByNumber())
    with pytest.raises(UsageError, match=r"data.workers = 5: .*\(at most 4\)"):
        source(workers=5, selector=ByNumber())
    source(cross=True, workers=5), source(workers=4, selector=ByNumber())


def test_a_checkpoint_without_selection_is_not_gone_on_with_by_selection():
    plain, choosing = source(), source(selector=ByNumber())
    for here, there in ((plain, choosing), (choosing, plain)):
        with pytest.raises(UsageError, match=r"predict.selection.kind: was 'off' on one side"):
            there.load_state_dict(here.state_dict())


class Listening(ByNumber):
    """Writes down what it hears of which group."""

    def __init__(self):
        super().__init__(keep=0.5)
        self.heard = []

    def hear(self, group, pieces_N, losses_N):
        self.heard.append((group, pieces_N.tolist(), losses_N.tolist()))


def heard_of(order, workers):
    """Six groups drawn as `order` says, a number at a time, and told then: by each document its summed ids, as losses."""
    rng = np.random.default_rng(5)
    docs = InMemory([rng.integers(3, 100, n) for n in rng.integers(2, 60, 80)])
    selector = Listening()
    source = PackedSource(planner([docs.lengths], selector), RowReader([docs]), ["a"], 128, [64], workers=workers)
    groups = []
    for drawn, told in order:
        groups += [source.draw() for _ in range(drawn)]
        for number in told:
            sums = []
            for batch in groups[number].batches:
                segments_BL = batch["segment_ids"]
                sums.append(
                    torch.zeros(len(segments_BL), int(segments_BL.max()) + 1, dtype=torch.float64).scatter_add(
                        1, segments_BL, batch["input_ids"].double()
                    )
                )
            groups[number].hear(sums)
    return sorted(selector.heard)


@pytest.mark.parametrize("workers", [0, 2])
def test_losses_go_to_the_group_they_are_of_also_when_others_were_drawn_ahead(workers):
    in_step = heard_of([(1, [i]) for i in range(6)], workers)
    assert [group for group, *_ in in_step] == list(range(6))
    assert heard_of([(2, [0]), (1, [1]), (1, [2]), (1, [3]), (1, [4, 5])], workers) == in_step
    assert heard_of([(3, [2, 0]), (3, [1, 5, 4, 3])], workers) == in_step
