"""The preflight in real processes, one of which is not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scale.cluster import preflight
from scale.cluster.verdict import Findings, own_problems, together_problems
from tests.distributed.harness import ROOT, free_port, rank_env


def check(folder: Path, defect: str, seconds: int = 20, *more: str) -> tuple[int, list[str]]:
    """Two ranks, the second with a defect. Returns exit code (of rank 0) and the lines that follow the table."""
    port = free_port()
    options = ["--folder", str(folder), "--seconds", str(seconds), "--megabytes", "1", *more]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.preflight_entry", defect, *options],
            cwd=ROOT,
            env=rank_env(rank, 2, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        output = ranks[0].communicate(timeout=seconds + 15)[0]
        return ranks[0].returncode, [line for line in output.splitlines() if line.startswith("preflight:")]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_fit(tmp_path: Path) -> None:
    code, lines = check(tmp_path, "none")
    assert code == 0, lines
    assert [line.split()[1] for line in lines] == ["all_reduce", "all_gather", "2"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        ("version", "transformers 4.0, but"),
        pytest.param("clock", "its clock is 60.0 s ahead of that of rank 0", marks=pytest.mark.slow),
        pytest.param("unshared", "is not shared", marks=pytest.mark.slow),
        pytest.param("unwritable", "is not writable", marks=pytest.mark.slow),
        pytest.param("never", "never reported", marks=pytest.mark.slow),
        ("hangs", "gives no sign of life"),
    ],
)
def test_bad_rank_is_named(tmp_path: Path, defect: str, said: str) -> None:
    code, lines = check(tmp_path, defect, 10 if defect == "never" else 20)
    assert code == 1
    assert lines[-1] == "preflight: not ready"
    problems = [line for line in lines if line.startswith(("preflight: rank", "preflight: all ranks"))]
    assert len(problems) == 1, lines
    assert problems[0].startswith("preflight: rank 1 (")
    assert said in problems[0]


@pytest.mark.slow
def test_slow_network(tmp_path: Path) -> None:
    code, lines = check(tmp_path, "none", 20, "--min-gbps", "1e6")
    assert code == 1
    assert any("all_reduce moves" in line and "less than --min-gbps 1e+06" in line for line in lines)


@pytest.mark.slow
def test_missing_gpu_is_named(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    code, lines = check(tmp_path, "none", 20, "--gpus")
    assert code == 1
    assert sum("no GPU" in line for line in lines) == 2


@pytest.mark.slow
def test_starts_ranks_of_this_machine(tmp_path: Path) -> None:
    options = ["--ranks-per-node", "2", "--folder", str(tmp_path), "--port", str(free_port()), "--megabytes", "1"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "preflight.py"), *options],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "preflight: 2 ranks ready"


def test_ends_though_rank_0_never_appears(tmp_path: Path) -> None:
    here = ["--nodes", "2", "--node-rank", "1", "--host", "127.0.0.1", "--port", str(free_port())]
    result = subprocess.run(
        [sys.executable, "-m", "scale.cluster.preflight", *here, "--folder", str(tmp_path), "--seconds", "6"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert "rank 1: no rank 0 at 127.0.0.1" in result.stdout


@pytest.mark.parametrize(
    "options",
    [[], ["--folder", "x", "--seconds", "1"], ["--folder", "x", "--nodes", "2"], ["--folder", "x", "--node-rank", "1"]],
)
def test_wrong_arguments(options: list[str]) -> None:
    assert preflight.main(options, {}) == 2


def report(rank: int, torch: str = "2.13.0") -> dict[str, object]:
    return {"rank": rank, "host": f"h{rank}", "versions": {"torch": torch}, "gpu": None, "folder": None}


def test_majority_is_right() -> None:
    found = Findings(3, {0: report(0, "2.12.0"), 1: report(1), 2: report(2)})
    [problem] = own_problems(found)
    assert (problem.rank, problem.host) == (0, "h0")
    assert problem.what == "torch 2.12.0, but 2.13.0 on most ranks"


def test_the_rank_that_stays_behind_is_named() -> None:
    found = Findings(3, {rank: report(rank) for rank in range(3)}, tried=True)
    found.stages = {0: "all_reduce", 1: "all_reduce", 2: "joining"}
    [problem] = together_problems(found, 0)
    assert (problem.rank, problem.what) == (2, "does not get beyond 'joining'")
    found.stages[2] = "all_reduce:connection timed out"
    [problem] = together_problems(found, 0)
    assert (problem.rank, problem.what) == (None, "all_reduce does not complete (connection timed out)")
