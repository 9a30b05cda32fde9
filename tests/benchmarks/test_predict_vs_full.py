"""What the regime table says of outcomes that are planted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scipy.stats import ttest_1samp

from benchmarks import predict_vs_full as table
from benchmarks.common import read_csv, summarise
from benchmarks.regimes.jobs import Job, Kept
from benchmarks.regimes.tasks import OTHERS, TASKS, Outcome, predictor
from scale.config.predict import PredictConfig


def outcome(loss, backward=100, forward=100, curve=((90, 2.0), (100, 1.9))):
    return Outcome(loss, backward, forward, 10.0 * backward, 0.5, [list(point) for point in curve], {"attempts": 1})


class Planted(Kept):
    """Every job ends with a loss that its kind, seed and learning rate alone decide."""

    def __init__(self):
        self.asked = []

    def outcome(self, tasks, job):
        self.asked.append(job)
        base = {"full": 2.0, "predict": 1.9, "tail mean": 1.8}.get(job.kind, 2.5)
        rate = 0.1 * abs(math.log(job.lr / 0.006)) if job.kind == "full" else 0.0
        return outcome(base + 0.01 * job.seed * (job.seed < 1000) + rate, backward=job.steps)


@pytest.mark.parametrize("name", TASKS)
def test_every_predictor_and_its_ablation_is_a_valid_config(name):
    task = TASKS[name]
    _, changes = table.shorter_jumps(task)
    whole, ablated = (PredictConfig.model_validate(predictor(task, **more)) for more in ({}, changes))
    assert whole != ablated and whole.enabled and ablated.mode == whole.mode


def test_updates_repeated_once_count_as_much():
    task = TASKS["text, lr 5x too small"]
    ratio = task.predict["extrapolation_ratio"]
    _, changes = table.shorter_jumps(task)
    ablated = predictor(task, **changes)
    assert ablated["guard"]["discount"] == pytest.approx(ratio * task.predict["guard"]["discount"])
    assert ablated["guard"]["settle_steps"] == task.predict["guard"]["settle_steps"], "what is not changed stays"


def test_controls_run_on_the_first_seeds_and_are_paired_with_them():
    task, kept = TASKS["text, tuned lr"], Planted()
    found = table.providers(task, list(range(5)), kept)
    assert len(found["full"]) == len(found["predict"]) == 5
    others = {name: len(runs) for name, runs in found.items() if name not in ("full", "predict")}
    assert set(others.values()) == {OTHERS["text"]} == {3} and len(others) >= 10
    assert table.changes_of(found, "full, tail mean") == pytest.approx([1.8 / 2 - 1, 1.81 / 2.01 - 1, 1.82 / 2.02 - 1])
    assert {job.seed for job in kept.asked if job.lr != 0.006} == {table.TUNING_SEED}, "6e-3 is best by construction"
    (row,) = [row for row in summarise("b", "m", "u", 1, "c", {"a": [2.0, 2.0], "base": [1.0, 4.0, 9.0]}, "base")][:1]
    assert row.ratio == pytest.approx((2.0 + 0.5) / 2) and row.n == 2


def test_a_verdict_by_hand():
    task = replace(TASKS["cnn"], margin=0.01)
    found = {
        "full": [outcome(2.0, curve=((90, 2.5), (100, 2.0))) for _ in range(3)],
        "predict": [outcome(loss, backward=25, forward=55) for loss in (1.9, 2.0, 2.2)],
        "shorter, a": [outcome(loss) for loss in (2.0, 2.2, 2.4)],
        "shorter, b": [outcome(loss) for loss in (2.1, 2.1, 2.1)],
        "full, tuned lr": [outcome(1.0) for _ in range(3)],
    }
    row = table.verdict(task, found)
    assert row["saved"] == pytest.approx(0.75) and row["flops"] == pytest.approx(1 - (55 + 50) / 300)
    assert row["falling"] == pytest.approx(0.2) and row["change"] == pytest.approx(0.0)
    assert (row["best"], row["control"]) == ("shorter, b", pytest.approx(0.05))
    assert row["control_full"] == pytest.approx(-0.5)
    spread = (((-0.05 - 1 / 60) ** 2 + (1 / 60) ** 2 + (0.1 - 1 / 60) ** 2) / 2) ** 0.5
    assert row["needed"] == math.ceil(((1.645 + 0.842) * spread / 0.01) ** 2)


def test_the_bound_is_that_of_a_one_sided_t_test():
    """At the bound itself, the test that the mean is lower has p = 5%."""
    changes = [-0.02, 0.01, 0.004, -0.013]
    bound = table.upper_bound(changes)
    assert ttest_1samp(changes, bound, alternative="less").pvalue == pytest.approx(0.05)
    assert math.isnan(table.upper_bound([0.1]))


def test_runs_are_kept_and_their_commit_is_named(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("benchmarks.regimes.jobs.run", lambda *given: calls.append(given) or outcome(1.5))
    job, path = Job("cnn", "full", 0, 3, 1e-3), tmp_path / "kept.jsonl"
    first = Kept(path, lambda text: None)
    assert first.outcome(TASKS, job) == first.outcome(TASKS, job) and first.commits
    again = Kept(path, lambda text: None)
    assert again.outcome(TASKS, job).loss == 1.5 and len(calls) == 1 and again.commits == first.commits


@pytest.mark.slow
def test_the_command_runs_and_writes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["predict_vs_full.py", "--quick", "--out", str(tmp_path)])
    assert table.main() == 0
    rows = {(row["provider"], row["metric"]): row for row in read_csv(tmp_path / "predict_vs_full.csv")}
    assert float(rows["predict", "backward"]["median"]) < float(rows["full", "backward"]["median"]) == 600
    assert "network" in capsys.readouterr().out
