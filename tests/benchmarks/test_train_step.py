"""The first benchmark and what all benchmarks share: hand-computed statistics, CSV merging, the gate, a whole run."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.common import (
    FIELDS,
    Machine,
    bar_plot,
    line_plot,
    paired_ratios,
    quantiles,
    read_csv,
    summarise,
    this_machine,
    write_csv,
)
from benchmarks.loops import PROVIDERS
from benchmarks.train_step import SPOILABLE, check_same_losses, main
from benchmarks.work import Clock, Run, Work
from scale.errors import ScaleError
from scale.protocols import Group
from tests.conftest import tiny_run

ROOT = Path(__file__).parents[2]
HERE = Machine("2026-01-01", "Some CPU", 2, "3.11", "2.13", "", "5.23", "abc")
ROWS = summarise("demo", "throughput", "tokens/s", 8, "tiny", {"bare": [10.0, 20.0], "ours": [5.0, 40.0]}, "bare")


def test_quantiles_lie_between_order_statistics():
    assert quantiles([6, 1, 5, 2, 4, 3]) == (2.0, 3.5, 5.0)
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)
    assert quantiles([0, 10]) == pytest.approx((2.0, 5.0, 8.0))


def test_ratios_are_taken_within_rounds():
    assert paired_ratios([2.0, 9.0], [4.0, 3.0]) == [0.5, 3.0]
    with pytest.raises(ValueError):
        paired_ratios([1.0], [1.0, 2.0])


def test_median_of_ratios_is_not_the_ratio_of_medians():
    measured = {"bare": [1.0, 10.0, 100.0], "ours": [2.0, 50.0, 120.0]}  # ratios 2, 5, 1.2; medians 50 and 10
    bare, ours = summarise("b", "m", "u", 1, "", measured, "bare")
    assert (bare.ratio, bare.ratio_q20, bare.ratio_q80) == (1.0, 1.0, 1.0)
    assert (ours.n, ours.median, ours.baseline) == (3, 50.0, "bare")
    assert (ours.ratio_q20, ours.ratio, ours.ratio_q80) == pytest.approx((1.52, 2.0, 3.8))


def test_csv_replaces_rows_of_the_same_machine_and_keeps_the_others(tmp_path):
    path = tmp_path / "new" / "demo.csv"
    gpu = replace(HERE, device="Some GPU")
    write_csv(path, ROWS, gpu)
    write_csv(path, ROWS, HERE)
    newer = replace(HERE, date="2026-02-02", commit="def")
    write_csv(path, [replace(ROWS[1], median=123456.789)], newer)
    found = read_csv(path)
    assert [(r["device"], r["provider"], r["commit"]) for r in found] == [
        ("Some GPU", "bare", "abc"),
        ("Some GPU", "ours", "abc"),
        ("Some CPU", "ours", "def"),
    ]
    assert found[2]["median"] == "123457" and found[2]["triton"] == ""
    assert path.read_text().splitlines()[0] == ",".join(FIELDS)
    assert [p.name for p in path.parent.iterdir()] == ["demo.csv"]
    write_csv(path, ROWS, replace(HERE, cpus=4))
    assert len(read_csv(path)) == 5


def test_this_machine_knows_its_versions():
    machine = this_machine("cpu")
    assert machine.torch == torch.__version__ and machine.cpus >= 1 and machine.device


def test_plots_are_written(tmp_path):
    bar_plot(tmp_path / "bar.png", ROWS, "bars")
    line_plot(tmp_path / "line.png", [*ROWS, *(replace(row, x=16.0) for row in ROWS)], "lines", "tokens")
    for name in ("bar.png", "line.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_gate_compares_every_loss_with_the_bare_loop():
    def runs(*losses: float) -> dict[str, Run]:
        return {"bare": Run([4.0, 2.0, 1.0], 1.0), "ours": Run(list(losses), 1.0)}

    assert check_same_losses(runs(4.0, 2.0, 1.0), 1e-5, 3)["ours"] == 0
    assert check_same_losses(runs(4.0, 2.00001, 1.0), 1e-5, 3)["ours"] == pytest.approx(5e-6)
    assert check_same_losses(runs(4.0, 2.0, 9.0), 1e-5, 2)["ours"] == 0  # only the first two count
    for wrong in (runs(4.0, 2.0001, 1.0), runs(4.0, float("nan"), 1.0)):
        with pytest.raises(ScaleError, match=r"ours: .* trains something else"):
            check_same_losses(wrong, 1e-5, 3)


def test_clock_runs_from_the_end_of_the_warm_up_to_the_start_of_the_last_step(monkeypatch):
    now = iter([3.0, 10.0])
    monkeypatch.setattr("benchmarks.work.time.perf_counter", lambda: next(now))
    groups = [Group([], tokens) for tokens in (1, 10, 100, 1000)]
    work = Work(None, groups, {}, None, torch.device("cpu"), "fp32", warm_up=1)  # type: ignore[arg-type]
    clock = Clock(work)
    for _ in groups:
        clock.step_begins()
    assert clock.run([torch.tensor(2.0), 1.0]) == Run([2.0, 1.0], 7.0)
    assert work.timed_tokens == 110


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config over a tiny corpus with 2 micro-batches per step, prepared once."""
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_run(folder, batch={"tokens": 512}, compute={"threads": 1})))
    return path


@pytest.mark.parametrize("provider", SPOILABLE)
def test_gate_fails_when_one_provider_sees_other_data(provider, config, tmp_path, capsys):
    out = tmp_path / "out"
    rest = [name for name in PROVIDERS if name != "scale_stream"]
    code = main(["--quick", "--config", str(config), "--out", str(out), "--spoil", provider, "--providers", *rest])
    shown = capsys.readouterr()
    assert code == 1
    assert "trains something else" in shown.err and "tokens/s" not in shown.out + shown.err
    assert not out.exists()
    if provider != "bare":
        assert f"{provider}: its losses" in shown.err


def test_whole_run_writes_one_row_per_provider(config, tmp_path):
    command = [sys.executable, "-m", "benchmarks.train_step", "--quick", "--config", config, "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "train_step.csv").open(newline="") as handle:
        reader = csv.DictReader(handle)
        rows = list(reader)
    assert reader.fieldnames == FIELDS
    assert [row["provider"] for row in rows] == list(PROVIDERS)
    for row in rows:
        assert (row["benchmark"], row["unit"], row["x"], row["n"]) == ("train_step", "tokens/s", "512", "2")
        assert 0 < float(row["q20"]) <= float(row["median"]) <= float(row["q80"])
        assert row["baseline"] == "bare" and float(row["ratio"]) > 0
    assert float(rows[0]["ratio"]) == 1
    assert (tmp_path / "out" / "train_step.png").exists()


def test_quick_refuses_to_overwrite_results(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--quick"])
    assert stopped.value.code == 2 and "--out" in capsys.readouterr().err
