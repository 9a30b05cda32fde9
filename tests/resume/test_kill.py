"""SIGKILL at random moments: the continued run writes the very metrics of an uninterrupted one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from scale.checkpoint.saved import latest_good
from tests.conftest import metrics_of, tiny_run

KILLS, DURING_SAVE = 20, 6
STEPS = 160


def config(folder: Path) -> Path:
    run = tiny_run(
        folder,
        train={"steps": STEPS},
        checkpoint={"every": 4, "keep_last": 2, "keep_best": 1},
        eval={"every": 8, "tokens": 512},
        optim={"lr": 3e-3, "kind": "muon"},
        schedule={"kind": "wsd", "warmup": 5},
    )
    run["data"] |= {
        "workers": 2,
        "curriculum": [{"until": 0.3, "seq_len": 16}, {"until": 0.6, "seq_len": 32}],
    }
    # wide enough that writing takes a while, and with random numbers in every forward pass
    run["model"]["overrides"] |= {"hidden_size": 256, "intermediate_size": 768, "attention_dropout": 0.1}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def start(path: Path, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "scale.cli.main", "train", str(path), f"name={name}", "compute.threads=1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes]) -> None:
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out.decode()[-2000:]


def rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def half_written(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob(".tmp-*"))


def kill_once(path: Path, folder: Path, during_save: bool, rng: random.Random) -> bool:
    """Start, wait for a random moment, SIGKILL. True if a checkpoint was being written at that moment."""
    process = start(path, folder.name)
    deadline = time.monotonic() + 200
    goal, first = rng.randint(1, 9), None
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0].decode()[-2000:]
        if during_save and half_written(folder) and first is not None and rows(folder) != first:
            time.sleep(rng.uniform(0, 0.02))
            break
        if (
            first is None
            and (folder / "run_state.json").exists()
            and '"running"' in (folder / "run_state.json").read_text()
        ):
            first = rows(folder)
        if not during_save and first is not None and rows(folder) >= first + goal:
            time.sleep(rng.uniform(0, 0.05))
            break
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return bool(half_written(folder))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_leave_no_trace_in_the_metrics(tmp_path: Path) -> None:
    path = config(tmp_path)
    finish(start(path, "whole"))
    rng, folder, during_save = random.Random(0), tmp_path / "runs" / "killed", 0
    for kill in range(KILLS):
        during_save += kill_once(path, folder, during_save=kill % 2 == 0, rng=rng)
    print(f"{KILLS} kills, {during_save} of them during a save")
    assert during_save >= DURING_SAVE, f"only {during_save} kills hit a save"
    assert rows(folder) < STEPS, "the run was over before the last kill"
    finish(start(path, "killed"))
    whole = tmp_path / "runs" / "whole"
    assert metrics_of(folder) == metrics_of(whole)
    assert len(metrics_of(whole)) == STEPS + 1  # and the evaluation before the first step
    a, b = (latest_good(f / "checkpoints", print) for f in (whole, folder))
    assert a is not None and b is not None
    assert a.state() == b.state()
