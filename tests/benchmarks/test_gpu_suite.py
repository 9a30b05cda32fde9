"""The suite for a GPU: its parts, what it checks first, what is left of it when it is stopped, and its dry run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks.common import read_csv

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"
PARTS = ["throughput", "tests", "fp8_check", "shards", "rssm_kernel", "plan_memory", "overhead", "train_step"]
FAKE = """#!/bin/sh
echo "$$ $*" >>"$(dirname "$0")/calls"
case "$*" in
  -c*) exit 0 ;;
  "- torch"*) echo "$LACKS" ;;
  *throughput.py*--out*) echo "$PYTHONPATH"; for last; do :; done; echo x >"$last/throughput.csv"; exit "$FAILS" ;;
  *fp8_check.py*) [ -z "$HANGS" ] || { setsid sleep 300 & echo "$!" >"$(dirname "$0")/orphan"; exec sleep 300; } ;;
esac
"""


@pytest.fixture
def suite(tmp_path):
    """Starts the suite with a Python that claims a GPU and does nothing but write one CSV."""
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)

    def start(**environment):
        given = os.environ | {"PYTHON": str(fake), "FAILS": "0", "LACKS": "", "HANGS": "", "OUT": str(tmp_path / "out")}
        return subprocess.Popen([SUITE], env=given | environment, stdout=-1, stderr=-1, text=True)

    return start


def outcomes(said):
    """Part -> how it ended and its CSV, from the table at the end."""
    table = said[said.rindex("part     ") :].splitlines()[1:]
    return {line.split()[0]: " ".join(line.split()[2:]) for line in table if len(line.split()) > 2}


def packed(archive):
    with tarfile.open(archive) as tar:
        files = [m for m in tar.getmembers() if m.isfile()]
        return {m.name.removeprefix("./"): tar.extractfile(m).read().decode() for m in files}


def test_a_part_that_fails_keeps_no_other_from_running(suite, tmp_path):
    said, errors = (process := suite(FAILS="3")).communicate(timeout=300)
    assert process.returncode == 1, said + errors
    assert outcomes(said) == {"throughput": "failed: exit code 3 throughput.csv"} | dict.fromkeys(PARTS[1:], "ok -")
    assert [*outcomes(said)] == PARTS
    files = packed(tmp_path / "out" / "gpu_suite.tar.gz")
    assert files["results/throughput.csv"] == "x\n" and files["logs/throughput.log"].startswith(".:kernels")
    assert outcomes(files["summary.txt"]) == outcomes(said)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu_suite.tar.gz"]


@pytest.mark.parametrize(
    ("only", "run"), [("first", PARTS[:3]), ("second", PARTS[3:]), ("tests shards", ["tests", "shards"])]
)
def test_halves_and_names(suite, only, run):
    said, _ = (process := suite(ONLY=only)).communicate(timeout=300)
    assert process.returncode == 0 and [*outcomes(said)] == run


def test_what_is_missing_is_said_before_anything_runs(suite, tmp_path):
    _, errors = (process := suite(LACKS="pydantic peft")).communicate(timeout=300)
    assert process.returncode == 1 and "lacks pydantic peft: carry their wheels here" in errors
    assert not (tmp_path / "out").exists() and "throughput.py" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_suite_that_is_stopped_packs_what_there_is_and_leaves_no_process(suite, tmp_path, how):
    process = suite(HANGS="1")
    orphan, deadline = tmp_path / "orphan", time.monotonic() + 300
    while not (orphan.exists() and orphan.read_text().strip()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    ours = [int(line.split()[0]) for line in (tmp_path / "calls").read_text().splitlines() if "fp8_check.py" in line]
    process.send_signal(how)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "stopped during fp8_check" in said
    assert "results/throughput.csv" in packed(tmp_path / "out" / "gpu_suite.tar.gz")
    for pid in (*ours, int(orphan.read_text())):
        assert not running(pid)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_or_written(tmp_path):
    given = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    done = subprocess.run([SUITE], env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "no GPU: nothing was measured\n"
    assert not (tmp_path / "out").exists()


def test_each_half_ends_within_eight_minutes():
    parts = SUITE.read_text().split('PARTS="')[1].split('"\n')[0]
    lines = [[cell.strip() for cell in line.split("|")] for line in parts.splitlines() if "|" in line]
    assert [line[0] for line in lines] == PARTS
    for half in ("first", "second"):
        assert sum(int(line[2]) for line in lines if line[1] == half) < 480 - 30


@pytest.mark.slow
def test_dry_run_of_the_parts_that_are_cheap_on_a_cpu(tmp_path):
    """All parts: DRY=1 benchmarks/gpu_suite.sh"""
    cheap = {"fp8_check": "fp8_check", "shards": "shards_kernel", "rssm_kernel": "rssm_kernel", "plan_memory": "plan_memory",
             "train_step": "train_step"}  # fmt: skip
    before = {path.name: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()}
    given = os.environ | {"DRY": "1", "OUT": str(tmp_path), "ONLY": " ".join(cheap), "PYTHON": sys.executable}
    done = subprocess.run([SUITE], env=given, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(done.stdout) == {name: f"ok {csv}.csv" for name, csv in cheap.items()}
    with tarfile.open(tmp_path / "gpu_suite.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    for csv in cheap.values():
        assert read_csv(tmp_path / "results" / f"{csv}.csv"), csv
    assert before == {path.name: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()}
