"""The course of a job script in a real cluster, with shell scripts in place of preflight and training."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.slurm.harness import ROOT, Cluster, Fields

pytestmark = pytest.mark.slow

PREFLIGHT = """\
import os, sys
print("preflight", *sys.argv[1:])
sys.exit(int(os.environ.get("PREFLIGHT_EXIT", "0")))
"""
TRAINING = """#!/bin/bash
echo "training $* on ${SLURMD_NODENAME} gpus ${SLURM_GPUS_ON_NODE:-none}"
if [[ -n ${LINGER:-} ]]; then
  until [[ -e $SCALE_STOP_FILE ]]; do sleep 0.1; done
  exit 75
fi
exit "${TRAINING_EXIT:-0}"
"""

Submit = Callable[..., int]


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Submit:
    """Submits pretrain_7b.sh from a checkout with stand-ins; output goes to tmp_path/out."""
    (tmp_path / "launch").mkdir()
    for folder in ("slurm", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name, text in {"preflight.py": PREFLIGHT, "torchrun.sh": TRAINING}.items():
        (tmp_path / "launch" / name).write_text(text)
        (tmp_path / "launch" / name).chmod(0o755)

    def run(*options: str, overrides: tuple[str, ...] = (), **env: str) -> int:
        place = [f"--output={tmp_path / 'out'}", f"--chdir={tmp_path}"]
        return cluster.sbatch(
            *place, *options, "slurm/pretrain_7b.sh", *overrides, SCALE_HOME=str(tmp_path), PYTHON=sys.executable, **env
        )

    return run


def ended(cluster: Cluster, job: int, tmp_path: Path) -> tuple[Fields, list[str]]:
    fields = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", timeout=60)
    return fields, (tmp_path / "out").read_text().splitlines()


def wait_for_line(path: Path, start: str, count: int = 1) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or sum(line.startswith(start) for line in path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    "options, ranks, gpus",
    [
        (["--gpus-per-node=2"], 2, "2"),
        (["--gres=gpu:3"], 3, "3"),
        ([], 4, "4"),  # --exclusive alone: all there are
        (["--gpus-per-node=0"], 1, "none"),
        (["--nodes=1", "--gpus-per-node=1"], 1, "1"),
        (["--ntasks-per-node=2", "--gpus-per-node=2"], 2, "2"),
    ],
)
def test_one_rank_for_each_gpu(options, ranks, gpus, cluster, submit, tmp_path):
    fields, lines = ended(cluster, submit(*options), tmp_path)
    assert fields["JobState"] == "COMPLETED", lines
    nodes = 1 if "--nodes=1" in options else 2
    assert sum(line.startswith("preflight --folder") for line in lines) == nodes * ranks
    training = sorted(line for line in lines if line.startswith("training -"))
    assert len(training) == nodes
    for node, line in enumerate(training):
        assert f"--node-rank {node} --nodes {nodes} --host 127.0.0.1" in line
        assert f"--ranks-per-node {ranks} {tmp_path}/configs/pretrain/7b.yaml on n{node} gpus {gpus}" in line


def test_config_and_overrides_arrive_as_they_are(cluster, submit, tmp_path):
    shutil.copy(tmp_path / "configs" / "demo.yaml", tmp_path / "my.yaml")
    job = submit(overrides=("runs_dir=a b", "data.cache=$HOME/*"), SCALE_CONFIG="my.yaml", SCALE_RANKS_PER_NODE="3")
    fields, lines = ended(cluster, job, tmp_path)
    assert fields["JobState"] == "COMPLETED", lines
    training = [line for line in lines if line.startswith("training -")]
    assert len(training) == 2 and f"preflight --folder {tmp_path}/a b --host" in "".join(lines)
    assert all("--ranks-per-node 3 my.yaml runs_dir=a b data.cache=$HOME/* on " in line for line in training)


@pytest.mark.parametrize("code", [1, 2])
def test_a_failed_run_keeps_its_exit_code_and_is_not_requeued(code, cluster, submit, tmp_path):
    fields, lines = ended(cluster, submit(TRAINING_EXIT=str(code)), tmp_path)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", f"{code}:0", "0"), lines


def test_nothing_starts_after_a_failed_preflight(cluster, submit, tmp_path):
    fields, lines = ended(cluster, submit(PREFLIGHT_EXIT="1"), tmp_path)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "0")
    assert not any(line.startswith("training -") for line in lines)
    assert any("preflight failed" in line for line in lines)


@pytest.mark.parametrize("how", ["USR1", "TERM"])
def test_a_restart_has_its_own_port_and_no_old_stop_file(how, cluster, submit, tmp_path):
    job = submit(LINGER="1", SCALE_MAX_RESTARTS="1")
    ports = set()
    for start in (1, 2):  # without a stop file the stand-ins wait: the second start has to be signalled as well
        wait_for_line(tmp_path / "out", "training -", 2 * start)
        ports.add((tmp_path / "out").read_text().splitlines()[-1].split("--port ")[1].split()[0])
        cluster.run("scancel", "--batch", f"--signal={how}", str(job))
    fields, lines = ended(cluster, job, tmp_path)
    assert len(ports) == 2
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "75:0", "1"), lines
    assert any("SCALE_MAX_RESTARTS = 1 reached" in line for line in lines)
    assert not list((tmp_path / "runs").glob(".stop-*"))


def test_a_cancelled_job_stays_cancelled(cluster, submit, tmp_path):
    job = submit(LINGER="1")
    wait_for_line(tmp_path / "out", "training -", 2)
    cluster.run("scancel", str(job))
    cluster.wait_for(job, "CANCELLED", timeout=60)
    cluster.wait_for_nodes()
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert "requeued" not in (tmp_path / "out").read_text().replace("not requeued", "")
