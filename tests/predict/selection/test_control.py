"""The share of documents as an arm of the bandit: it is found where it pays, left where it does not, and resumed exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scale.build import build_trainer
from scale.config import load_config
from scale.config.predict import PredictConfig
from scale.data import planner as planning
from scale.data.selection import LAG
from scale.errors import UsageError
from scale.parallel.ranks import Ranks
from scale.predict.selection.control import LONGEST, Episode, between, gain
from tests.distributed.harness import run_ranks
from tests.predict.runs import LAST, assert_same_run, cut_back, fit, rows, state, write
from tests.predict.selection.planted_shares import STEPS, Run
from tests.train.parts import Numbers

BANDIT = LAST | {"selection": {"kind": "history", "warmup": 0, "control": "bandit", "shares": [0.25], "episode": 4}}
LONG = "train.steps=90"
WINDOW_ROWS = 32


@pytest.fixture(autouse=True, scope="module")
def small_windows():
    """Two steps of 16 rows or four of 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "WINDOW_ROWS", WINDOW_ROWS)
        yield


@pytest.fixture(scope="module")
def teaching() -> Run:
    return Run("trivial").train(STEPS)


def test_a_share_that_teaches_more_is_trained_on_more_and_more(teaching):
    drawn = [row["drawn"] == 0.5 for row in teaching.rows]
    parts = [sum(drawn[at : at + STEPS // 3]) / (STEPS // 3) for at in range(0, STEPS, STEPS // 3)]
    assert parts[0] < 0.6 and parts[1] > 0.6 and parts[2] > 0.75 and parts == sorted(parts)
    rewards = [reward for _, _, reward in teaching.decided() if reward is not None]
    assert all(0.3 < reward < 0.6 for reward in rewards[1:]), "twice as fast is a gain of a half"
    expected = teaching.stepper.control.bandit.expected([1.0, 0.5, 0.5])
    assert expected[0.5, "share"] > 0.2


def test_a_share_of_noise_is_left_for_all_documents():
    run = Run("noise").train(STEPS)
    rewards = [reward for _, _, reward in run.decided() if reward is not None]
    assert rewards and max(rewards) < -0.3
    assert run.decided()[-1][1] == 1.0 and all(row["drawn"] == 1.0 for row in run.rows[-100:])
    assert sum(row["drawn"] == 1.0 for row in run.rows) > 0.75 * STEPS


def test_episodes_are_measured_on_one_share_alone_and_paid_for(teaching):
    before, share, start, streak, longest = 1.0, 1.0, 0, 0, 0
    for end, chosen, _ in teaching.decided():
        assert {row["drawn"] for row in teaching.rows[end - 10 : end]} == {share}
        assert end - start >= (10 if share == before else LAG - 1 + 2 + 10)
        streak = streak + 1 if share == 0.5 else 0
        longest = max(longest, streak)
        before, share, start = share, chosen, end
    assert 2 < longest <= LONGEST
    ledger = teaching.stepper.ledger
    assert ledger.check_forwards > len(teaching.decided())
    assert sum(row["forwards"] for row in teaching.rows) == STEPS + ledger.check_forwards


def test_a_share_is_compared_with_both_its_neighbours_by_hand():
    def at(middle, rate):
        return Episode(1.0, [], 0, 0.0, 0, middle, rate)

    assert between(at(10, 4.0), at(30, 1.0), 20) == pytest.approx(2.0)  # halved in ten steps
    assert between(at(10, 1.0), at(30, -1.0), 25) == pytest.approx(-0.5)
    assert gain(2.0, 1.0) == 0.5 and gain(0.5, 1.0) == -0.5 and gain(1.0, 1.0) == gain(0.0, 0.0) == 0.0
    assert gain(1.0, -1.0) == 1.0 and gain(-1.0, 3.0) == -1.0 and gain(-1.0, -2.0) == 0.5


def test_what_a_probe_costs_is_taken_off():
    def first_rate(probed):
        run = Run("trivial")
        run.stepper.control._over = lambda episode, loss, over=run.stepper.control._over: over(
            episode, episode.loss - 1.0
        )
        run.train(12 + 7)
        run.stepper.ledger.probe_tokens += probed
        run.stepper._account_selection = lambda source, report: None
        return run.train(1).rows[-1]["share_rate"]

    assert first_rate(0) == pytest.approx(1 / 10)
    assert first_rate(3 * 512) == pytest.approx(1 / 11)  # three steps' tokens forward: one full step


def test_a_loss_that_is_not_finite_teaches_nothing_and_leads_back_to_all_documents(teaching):
    run = Run("trivial").train(45)
    control = run.stepper.control
    assert control.share == 1.0 and control.waiting and control.base
    before = json.dumps(control.bandit.state_dict())
    level = run.stepper.attempts.level
    control.level = lambda source: level(source) and float("nan")
    run.train(25)
    control.level = level
    said = run.decided()[-1]
    assert said[1:] == (1.0, None) and run.rows[said[0] - 1]["share_rate"] is None
    assert json.dumps(control.bandit.state_dict()) == before and not control.waiting and control.base is None


@pytest.mark.parametrize("cut", [3, 14, 20, 21, 33, 37, 51, 75, 110])
def test_planning_and_thinking_go_on_exactly(teaching, cut):
    """Of the stepper and the source; weights are those of the whole run's at the cut."""
    whole = Run("trivial").train(cut)
    saved = json.loads(json.dumps([whole.stepper.state_dict(), whole.source.state_dict()]))
    again = Run("trivial")
    again.stepper.load_state_dict(saved[0])
    again.source.load_state_dict(saved[1])
    again.root.load_state_dict(whole.root.state_dict())
    again.stepper.restore(whole.stepper.tensors())
    again.train(60)
    clean = [{k: v for k, v in row.items() if k != "ledger"} for row in again.rows]
    expected = [{k: v for k, v in row.items() if k != "ledger"} for row in teaching.rows[cut : cut + 60]]
    assert clean == expected


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with jumps and shares."""
    return fit(write(tmp_path_factory.mktemp("shares"), "whole", BANDIT), LONG)


def said(run: Path) -> list[dict[str, Any]]:
    return [row["prediction"] | {"step": row["step"], "kind": row["phase"]} for row in rows(run)[1:]]


def test_a_jump_and_an_episode_never_meet(whole):
    found = said(whole)
    ends = [row["step"] for row in found if "share" in row]
    kinds = {row["step"]: row["kind"] for row in found}
    assert len(ends) >= 3 and rows(whole)[-1]["ledger"]["accepted"] >= 1
    assert {row["share"] for row in found if "share" in row} > {1.0}
    for end in ends:
        real = [kinds[step] for step in range(end - 3, end + 1)]
        assert real == ["full"] * 4, "four steps of an episode, none of them relaxing or counted"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_died_goes_on_bit_for_bit(whole, workers, tmp_path):
    path = whole.parent.parent / "whole.yaml"
    ends = [row["step"] for row in said(whole) if "share" in row]
    for step in (ends[1] - 2, ends[2] + 3)[: 1 if workers else 2]:
        cut_back(whole, step, tmp_path / str(step))
        assert state(tmp_path / str(step) / "whole")["stepper"]["predict"]["control"]
        assert_same_run(whole, fit(path, LONG, f"runs_dir={tmp_path / str(step)}", f"data.workers={workers}"))


def decide(ranks: Ranks, path: str) -> list[Any]:
    """For `run_ranks`: what each rank chose and knows."""
    planning.WINDOW_ROWS = WINDOW_ROWS
    trainer = build_trainer(load_config(path, [LONG, "compute.strategy=fsdp"]), ranks=ranks)
    shares: list[float | None] = []
    step = trainer.stepper.step

    def watched(source: Any) -> Any:
        report = step(source)
        shares.append(trainer.source.share())
        return report

    trainer.stepper.step = watched
    trainer.fit()
    control = trainer.stepper.control
    return [shares, control.state_dict(), trainer.source.state_dict()["planner"]["budget"]]


@pytest.mark.slow
def test_two_processes_choose_the_same(tmp_path):
    path = write(tmp_path, "two", BANDIT, batch={"sequences": 8, "micro": 2})
    first, second = run_ranks("tests.predict.selection.test_control:decide", path=str(path))
    assert first == second and len(set(first[0])) > 2
    assert [row for row in said(tmp_path / "runs" / "two") if "share" in row]


def test_what_makes_no_sense_is_refused():
    def config(**changes):
        given = {"enabled": True, "selection": {"kind": "history", "control": "bandit"} | changes.pop("selection", {})}
        return PredictConfig.model_validate(given | changes)

    for changes, text in (
        ({"mode": "observe"}, "selection.control = 'bandit': needs mode = 'auto' (it is 'observe')"),
        ({"selection": {"kind": "off"}}, "needs selection.kind = 'history' or 'world' (it is 'off')"),
        ({"selection": {"keep": 1.0}}, "selection.keep below 1 (it is 1)"),
        ({"selection": {"control": "fixed", "shares": [0.3]}}, r"selection.shares = [0.3]: needs selection.control"),
        ({"selection": {"shares": [0.5]}}, "name each share once"),
        ({"selection": {"shares": [1.0]}}, "less than 1"),
    ):
        with pytest.raises(ValueError) as found:
            config(**changes)
        assert text in str(found.value)


def test_a_source_that_draws_no_documents_is_refused(teaching):
    with pytest.raises(UsageError, match="this source does not choose documents"):
        teaching.stepper.control.after(Numbers(8))
