import copy
import json
from collections import defaultdict

import numpy as np
import pytest

from scale.config.predict import SelectionConfig
from scale.data import planner as planning
from scale.data.packing import Span
from scale.data.selection import LAG
from scale.errors import ScaleError, UsageError
from scale.parallel.ranks import Ranks
from scale.predict.selection.selector import LossSelector, Probed, make_selector
from tests.predict.selection.parts import alone, same, selecting, step, steps

KINDS = [
    {"kind": "history"},
    {"kind": "history", "unbiased": True},
    {"kind": "regression"},
    {"kind": "regression", "unbiased": True, "keep": 0.3},
]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Two groups of 16-token rows in a window, four of 32-token rows."""
    monkeypatch.setattr(planning, "WINDOW_ROWS", 32)


def selector(**config):
    return LossSelector(SelectionConfig(**({"kind": "history", "keep": 0.5, "warmup": 0} | config)), alone(6))


def ask(made, group):
    return made.scores(group, [Span(0, i, 0, 4) for i in range(6)], np.arange(6)).tolist()


def test_losses_are_known_when_they_are_lag_groups_old():
    made = selector()
    made.hear(3, np.array([1]), np.array([2.0]))
    assert ask(made, 3 + LAG - 1)[1] == np.inf
    made.hear(4, np.array([1]), np.array([4.0]))
    assert ask(made, 3 + LAG)[1] == pytest.approx(2.0)
    assert ask(made, 4 + LAG)[1] == pytest.approx(0.7 * 2 + 0.3 * 4)


def test_hearing_too_late_is_an_error():
    made = selector()
    ask(made, 20)
    with pytest.raises(ScaleError, match=f"heard of group {20 - LAG} after plans"):
        made.hear(20 - LAG, np.array([1]), np.array([2.0]))
    made.hear(20 - LAG + 1, np.array([1]), np.array([2.0]))


def test_what_waits_is_forgotten_once_every_view_knows_it():
    made = selector()
    for group in range(200):
        if group % 8 == 0:
            ask(made, group)
        made.hear(group, np.array([group % 6]), np.array([1.0]))
    assert [one.group for one in made.heard] == list(range(200 - LAG, 200))


def remember(memory, key, loss):
    memory[key] = 0.7 * memory[key] + 0.3 * loss if key in memory else loss


def test_the_control_keeps_unseen_documents_then_the_hardest():
    """Over the first epochs, against a plain simulation of the rule on the groups drawn."""
    source = selecting(lesson=lambda n: 32, keep=0.5)
    chosen, remembered, documents, waiting = [], {}, {}, []
    of_piece = {}
    original = source.planner._chosen

    def watch(selector, candidates):
        picked = original(selector, candidates)
        chosen.append((source.planner.groups, candidates, picked[0]))
        return picked

    source.planner._chosen = watch
    heard = source.planner.selector.hear
    source.planner.selector.hear = lambda g, p, losses: (waiting.append((g, p, losses)), heard(g, p, losses))
    kept, taken, at, windows = [0, 0], [0, 0], 0, 0
    for number in range(120):
        step(source, number)
    for _, candidates, _ in chosen:
        of_piece |= dict(zip(source.planner.pieces(candidates).tolist(), [s[:2] for s in candidates], strict=True))
    for group, candidates, picked in chosen:
        while at < len(waiting) and waiting[at][0] <= group - LAG:
            heard = defaultdict(list)
            for piece, loss in zip(*waiting[at][1:], strict=True):
                remember(remembered, piece, loss)
                heard[of_piece[piece]].append(loss)
            for document, values in heard.items():
                remember(documents, document, sum(values) / len(values))
            at += 1
        expected = []
        for source_number in (0, 1):
            mine = [span for span in candidates if span.source == source_number]
            taken[source_number] += sum(span.length for span in mine)
            numbers = source.planner.pieces(mine).tolist()
            worth = {s: remembered.get(n, documents.get(s[:2], np.inf)) for s, n in zip(mine, numbers, strict=True)}
            for span in sorted(mine, key=lambda s: -worth[s]):
                if kept[source_number] < 0.5 * taken[source_number]:
                    kept[source_number] += span.length
                    expected.append(span)
        assert sorted(picked) == sorted(expected)
        windows += 1
    assert windows > 20 and source.planner.kept == kept
    counts = source.passed_over()
    assert counts["a"]["tokens"] == source._state["taken"][0] - source._state["kept"][0] > 0


def test_nothing_is_left_out_before_its_warm_up_is_over():
    """Up to then the batches are those of no selection at all; what was heard meanwhile counts from then on."""
    warm, whole = selecting(keep=0.5, warmup=30), selecting(keep=1.0)
    for number in range(30):
        same([step(warm, number)], [step(whole, number)])
        assert warm.selection()["documents_skipped"] == 0
    steps(warm, 30, 60)
    assert warm.selection()["documents_skipped"] > 0
    cold = selecting(keep=0.5, warmup=29)
    steps(cold, 0, 30)
    assert cold.selection()["documents_skipped"] > 0, "a window is opened for group 29"


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_a_batch_nor_a_state(config, workers):
    plain, ahead = selecting(**config), selecting(workers, **config)
    same(steps(plain, 0, 60), steps(ahead, 0, 60))
    assert json.dumps(plain.state_dict()) == json.dumps(ahead.state_dict())


def test_what_was_heard_does_change_batches():
    quiet, heard = selecting(), selecting()
    with pytest.raises(AssertionError):
        same([quiet.draw() for _ in range(60)], steps(heard, 0, 60))


@pytest.mark.parametrize("config", KINDS)
def test_resume_is_exact_at_every_group_around_windows_and_lessons(config):
    whole, states = [], []
    source = selecting(**config)
    for number in range(50):
        whole.append(step(source, number))
        states.append(json.dumps(source.state_dict()))
    for cut in range(8, 30):
        again = selecting(**config)
        again.load_state_dict(json.loads(states[cut]))
        assert json.dumps(again.state_dict()) == states[cut]
        same(whole[cut + 1 :], steps(again, cut + 1, 50))
        assert json.dumps(again.state_dict()) == states[-1]


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 2), (4, 1)])
def test_resume_is_exact_for_any_number_of_workers(before, after):
    whole = steps(selecting(), 0, 50)
    first = selecting(before)
    steps(first, 0, 19)
    state = json.loads(json.dumps(first.state_dict()))
    second = selecting(after)
    second.load_state_dict(state)
    same(whole[19:], steps(second, 19, 50))


def test_saving_changes_nothing():
    saving, silent = selecting(2, kind="regression"), selecting(2, kind="regression")
    for number in range(50):
        a = step(saving, number)
        saving.state_dict()
        same([a], [step(silent, number)])


def test_groups_that_nobody_hears_of_are_fine_and_resume_too():
    def some(source, first, last):
        return [step(source, n) if n % 3 else source.draw() for n in range(first, last)]

    source, ahead = selecting(), selecting(3)
    whole = some(source, 0, 50)
    same(whole, some(ahead, 0, 50))
    first = selecting()
    some(first, 0, 23)
    second = selecting(1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    same(whole[23:], some(second, 23, 50))


def test_rehearsal_has_the_shapes_of_training_and_takes_nothing():
    source = selecting(unbiased=True)
    before = json.dumps(source.state_dict())
    shown = source.rehearse().batches
    assert json.dumps(source.state_dict()) == before
    drawn = source.draw().batches[0]
    assert {k: (v.shape, v.dtype) for k, v in shown[0].items()} == {k: (v.shape, v.dtype) for k, v in drawn.items()}
    assert "weights" in drawn and "weights" not in selecting().draw().batches[0]


class Scripted:
    """Probe: the loss of a span is its document's number."""

    def __init__(self):
        self.asked = []

    def __call__(self, spans):
        self.asked.append(list(spans))
        losses = np.array([float(s.doc) for s in spans])
        losses[0] = np.nan
        return Probed(losses, 2, sum(s.length for s in spans))


def test_a_share_of_the_candidates_is_probed_where_it_is_least_sure():
    made, probe = selector(kind="regression", probe=0.34), Scripted()
    made.probe = probe
    rng = np.random.default_rng(0)
    for group in range(30):
        made.hear(group, np.array([0, 2, 3, 5]), rng.normal(3, 0.1, 4))
    made.planning.advance(made.heard, 40 - LAG)
    expected, unsure = made.planning.foresight.scores(40, np.arange(6))
    scores = ask(made, 40)
    assert [s.doc for s in probe.asked[0]] == [1, 4]  # never seen
    assert scores[4] == 4.0 and scores[:4] == (expected + unsure)[:4].tolist()  # no token of 1 is learned: as foreseen
    assert expected[1] == pytest.approx(3, abs=0.5)
    assert made.probed == {"documents": 2, "tokens": 8, "forwards": 2}
    assert made.heard[-1].group == 40 and made.heard[-1].pieces_N.tolist() == [4]
    made.hear(60, np.array([0]), np.array([3.0]))
    assert np.isfinite(made.planning.foresight.history.loss_P[4])


def test_probing_is_resumed_exactly():
    config = {"kind": "regression", "probe": 0.2}
    source, states = selecting(prober=Scripted(), **config), []
    whole = []
    for number in range(40):
        whole.append(step(source, number))
        states.append(copy.deepcopy(source.state_dict()))
    for cut in (9, 10, 11, 12, 20):
        again = selecting(prober=Scripted(), **config)
        again.load_state_dict(json.loads(json.dumps(states[cut])))
        same(whole[cut + 1 :], steps(again, cut + 1, 40))
        assert json.dumps(again.state_dict()) == json.dumps(states[-1])


def test_what_makes_no_sense_is_refused():
    assert make_selector(SelectionConfig(), [5], 64, Ranks()) is None
    with pytest.raises(UsageError, match=r"selection.probe = 0.1: needs data.workers = 0 \(it is 1\)"):
        make_selector(SelectionConfig(kind="regression", probe=0.1), [5], 1, Ranks())
    with pytest.raises(ScaleError, match="nobody gave it a model"):
        ask(selector(kind="regression", probe=0.5), 0)
