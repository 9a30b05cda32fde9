"""Another share of documents from some group on: the same batches for any number of workers, after any resume."""

import json

import numpy as np
import pytest

from scale.data import planner as planning
from scale.data.selection import LAG, Budget
from scale.errors import ScaleError, UsageError
from tests.predict.selection.parts import same, selecting, step, steps

CHOICES = {4: 0.5, 17: 0.3, 19: 0.5, 33: 1.0, 48: 0.3}
"""After some steps."""
KINDS = [{"kind": "history"}, {"kind": "world"}, {"kind": "world", "unbiased": True}]
BANDIT = {"control": "bandit", "shares": (0.3,)}
COUNT = 70


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(planning, "WINDOW_ROWS", 32)


def lived(source, first=0, last=COUNT):
    """Steps, after some of which another share is chosen; the share of each."""
    groups, shares = [], []
    for number in range(first, last):
        groups.append(step(source, number))
        shares.append(source.share())
        if number in CHOICES:
            source.choose(CHOICES[number])
    return groups, shares


def test_a_budget_is_what_each_share_allowed_by_hand():
    budget = Budget(2)
    budget.change(0.5, [0, 0])
    assert budget.allowed(0, 30) == 15
    budget.change(0.25, [40, 8])
    assert budget.allowed(0, 60) == 20 + 5 and budget.allowed(1, 8) == 4
    again = Budget(2)
    again.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    assert again.allowed(0, 60) == 25


def test_all_documents_until_a_choice_is_lag_groups_old_and_its_window_is_reached():
    _, shares = lived(selecting(**BANDIT))
    assert shares[: 4 + LAG] == [1.0] * (4 + LAG)
    order = [share for n, share in enumerate(shares) if share is not None and (n == 0 or share != shares[n - 1])]
    assert order[:2] == [1.0, 0.5] and order[-2:] == [1.0, 0.3] and set(order) == {1.0, 0.5, 0.3}
    for at, share in ((4, 0.5), (33, 1.0), (48, 0.3)):
        reached = shares.index(share, at)
        assert at + LAG <= reached <= at + LAG + 8, "the windows of these rows hold two or four groups"


def test_positions_kept_follow_the_share_of_the_window_that_they_came_from():
    source = selecting(lesson=lambda n: 32, **BANDIT)
    kept = {}
    original = source.planner._chosen

    def watch(selector, candidates):
        share, spans = source.planner.budget.keep, original(selector, candidates)
        looked, trained = kept.setdefault(share, [0, 0])
        kept[share] = [looked + sum(s.length for s in candidates), trained + sum(s.length for s in spans[0])]
        return spans

    source.planner._chosen = watch
    lived(source)
    assert set(kept) == {1.0, 0.5, 0.3}
    for share, (looked, trained) in kept.items():
        assert trained == pytest.approx(share * looked, abs=4 * 32), "one piece of each source at each change at most"


def test_a_group_is_of_one_share_where_all_its_rows_are():
    """Against the window that each row came from."""
    source = selecting(lesson=lambda n: 16, **BANDIT)
    planner, origin, found = source.planner, {}, []
    window, following = planner._window, planner.next

    def watch_window(*arguments):
        rows, weights = window(*arguments)
        origin.update((id(row), (row, planner.budget.keep)) for row in rows)
        return rows, weights

    def watch_plan():
        plan = following()
        found.append({origin[id(row)][1] for row in plan.rows})
        return plan

    planner._window, planner.next = watch_window, watch_plan
    _, shares = lived(source)
    assert len(found) == COUNT and any(len(shares_) > 1 for shares_ in found)
    for of_rows, share in zip(found, shares, strict=True):
        assert of_rows == {share} if share is not None else True
    assert sum(share is None for share in shares) <= 2 * len(CHOICES)


def test_without_a_choice_it_is_a_plain_run():
    plain, never = selecting(kind="history", keep=1.0), selecting(**BANDIT)
    same(steps(plain, 0, 60), steps(never, 0, 60))
    assert never.share() == 1.0 and never.selection()["documents_skipped"] == 0
    plain = selecting()
    plain.planner.selector = None
    same([plain.draw() for _ in range(60)], steps(selecting(**BANDIT), 0, 60))


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_a_batch_nor_a_state(config, workers):
    plain, ahead = selecting(**config, **BANDIT), selecting(workers, **config, **BANDIT)
    (a, shares), (b, others) = lived(plain), lived(ahead)
    same(a, b)
    assert shares == others and json.dumps(plain.state_dict()) == json.dumps(ahead.state_dict())


@pytest.mark.parametrize("config", KINDS)
def test_resume_is_exact_at_every_group_around_a_choice(config):
    source, whole, states = selecting(**config, **BANDIT), [], []
    for number in range(COUNT):
        whole += lived(source, number, number + 1)[0]
        states.append(json.dumps(source.state_dict()))
    for cut in range(3, 45, 2):
        again = selecting(**config, **BANDIT)
        again.load_state_dict(json.loads(states[cut]))
        assert json.dumps(again.state_dict()) == states[cut]
        same(whole[cut + 1 :], lived(again, cut + 1)[0])
        assert json.dumps(again.state_dict()) == states[-1]


def test_choosing_too_late_or_where_nothing_is_chosen_is_an_error():
    selector = selecting(**BANDIT).planner.selector
    assert selector.keep(20) == 1.0
    with pytest.raises(ScaleError, match=f"heard of group {20 - LAG} after plans"):
        selector.choose(20 - LAG, 0.5)
    plain = selecting()
    plain.planner.selector = None
    with pytest.raises(UsageError, match=r"a share of 0.5 was chosen, but the source trains on all"):
        plain.choose(0.5)


def test_a_fixed_share_is_the_one_of_the_config_also_after_a_resume():
    source = selecting(keep=0.5)
    steps(source, 0, 9)
    other = selecting(keep=0.25)
    other.load_state_dict(json.loads(json.dumps(source.state_dict())))
    steps(other, 9, 40)
    assert other.share() == 0.25 and np.isclose(other.planner.budget.due_S[0], 0.5 * other.planner.budget.since_S[0])
