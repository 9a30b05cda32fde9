"""Ranks end with whoever started them, at whatever moment that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT

# what a launcher's agent does, then its death after a while
STARTER = """
import os, subprocess, sys, time
seconds, *command = sys.argv[1:]
process = subprocess.Popen(command, env=os.environ | {"SCALE_PARENT": str(os.getpid())}, stderr=subprocess.DEVNULL)
print(process.pid, flush=True)
time.sleep(float(seconds))
os.kill(os.getpid(), 9)
"""


def lives(pid: int) -> bool:
    """Whether the process is there and not merely waiting for its exit code to be read."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def wait_for(what: Callable[[], object], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("seconds", [0, 0.05, 0.2, 1])
def test_a_rank_ends_with_its_parent(make_config: Callable[..., Path], seconds: float) -> None:
    """Also where the parent is gone before the rank has read a line of its program."""
    command = ["-m", "scale.cli.main", "train", str(make_config()), "train.steps=100000"]
    starter = [sys.executable, "-c", STARTER, str(seconds), sys.executable, *command]
    done = subprocess.run(starter, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL
    rank = int(done.stdout)
    try:
        wait_for(lambda: not lives(rank), 30)
    finally:
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def test_what_a_rank_starts_is_not_bound_to_the_launcher() -> None:
    """A program of this package started by a rank has the rank as its parent."""
    inner = "from scale.cli.main import main; main(['--version'])"
    text = f"""
import subprocess, sys
from scale.lifeline import die_with_launcher
die_with_launcher()
sys.exit(subprocess.run([sys.executable, "-c", {inner!r}]).returncode)
"""
    environment = os.environ | {"SCALE_PARENT": str(os.getpid())}
    assert subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=environment, timeout=100).returncode == 0


def ranks_of(config: Path) -> list[int]:
    """Processes that run `scale train` with this config: the arguments of agent and launcher are other ones."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"scale.cli.main" in words and str(config).encode() in words and lives(int(folder.name)):
                found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.1, 0.3, 1, 3])
def test_ranks_end_with_a_killed_launcher(make_config: Callable[..., Path], seconds: float) -> None:
    config = make_config()
    process = subprocess.Popen(
        [str(ROOT / "launch" / "torchrun.sh"), "--ranks-per-node", "2", str(config), "train.steps=100000"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: ranks_of(config))
        time.sleep(seconds)
        process.kill()
        process.wait()
        wait_for(lambda: not ranks_of(config), 20)
    finally:
        process.kill()
        for rank in ranks_of(config):
            os.kill(rank, signal.SIGKILL)
