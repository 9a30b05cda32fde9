"""The shell scripts without a cluster: an interpreter that does not know the package, and the end of a job."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from scale.errors import EXIT_STOPPED
from tests.distributed.harness import ROOT

# for `scale_job` up to the plan of the job, without Slurm
JOB = """
set -euo pipefail
source "$SCALE_HOME/slurm/common.sh"
plan_job() { echo "$RUNS"; RESTARTS=$1; MAX_RESTARTS=2; }
preflight() { exit 0; }
scale_job "$CONFIG"
"""


@pytest.fixture
def foreign(tmp_path: Path) -> dict[str, str]:
    """Environment with a Python that reads no .pth files, so that packages of PYTHONPATH are all it has."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    packages = sysconfig.get_path("purelib")
    return os.environ | {"PYTHON": str(python), "PYTHONPATH": packages, "SCALE_HOME": str(ROOT)}


def test_torchrun_runs_this_checkout_from_any_folder(foreign: dict[str, str], tmp_path: Path) -> None:
    command = [str(ROOT / "launch" / "torchrun.sh"), "--ranks-per-node", "2", "none.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=foreign, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("scale: error: none.yaml")


def job(environment: dict[str, str], config: Path, restarts: int, folder: Path) -> subprocess.CompletedProcess[str]:
    script = JOB.replace("$1", str(restarts))
    environment = environment | {"CONFIG": str(config)}
    command = ["bash", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


def test_a_job_runs_this_checkout_from_any_folder(
    foreign: dict[str, str], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_config()
    done = job(foreign, config, 0, tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{config.parent / 'runs'}\n"), done.stderr


def test_a_job_that_slurm_requeued_too_often(
    foreign: dict[str, str], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    done = job(foreign, make_config(), 3, tmp_path)
    assert done.returncode == EXIT_STOPPED
    assert "SCALE_MAX_RESTARTS = 2" in done.stdout
