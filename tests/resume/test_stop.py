"""Signals to a real training process: a checkpoint, exit code 75, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import metrics_of


def start(config: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scale.cli.main", "train", str(config), f"name={name}", "data.workers=1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, "train.steps=60", "compute.threads=1"], start_new_session=True, **pipes)


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)


def wait_for_end_of_training(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while '"paused"' not in (folder / "run_state.json").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(0.02)  # between the last record and the return of `fit`


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_ends_with_a_checkpoint(number, make_config, tmp_path):
    """Slurm and terminals signal every process of the job, the data workers included."""
    config = make_config()
    process = start(config, "stopped")
    wait_for_rows(tmp_path / "runs" / "stopped", 4, process)
    os.killpg(process.pid, number)
    if number == signal.SIGTERM:  # an impatient scheduler signals again while the process is on its way out
        wait_for_end_of_training(tmp_path / "runs" / "stopped")
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    done = metrics_of(tmp_path / "runs" / "stopped")[-1]["step"]
    assert signal.Signals(number).name in out and f"stopped: step {done} of 60" in out and done < 60
    checkpoints = [p.name for p in (tmp_path / "runs" / "stopped" / "checkpoints").iterdir()]
    assert f"step_{done:08d}" in checkpoints
    again, whole = start(config, "stopped"), start(config, "whole")
    assert again.wait(120) == 0 and whole.wait(120) == 0
    assert metrics_of(tmp_path / "runs" / "stopped") == metrics_of(tmp_path / "runs" / "whole")
