"""One rank as a child process of a Ray actor. The actor outlives a killed driver for as long as a checkpoint takes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from scale.cluster.attempts import read_outcome
from scale.cluster.environment import rank_environment
from scale.cluster.killed import OutOfMemoryKiller
from scale.cluster.options import interface_of
from scale.lifeline import PARENT

ORPHAN_SECONDS = 20
"""Without a word from the driver for so long, a rank stops after a checkpoint. `ray job stop` kills drivers after 3 s."""


@dataclass(frozen=True)
class Task:
    """What an actor runs."""

    rank: int
    command: list[str]
    """For the Python interpreter."""
    environment: dict[str, str]
    address: str
    """Of its machine."""
    ranks_here: int
    logs: Path
    """Folder in the run folder to which the output of ranks other than 0 goes in the end."""
    run: Path


@dataclass
class Result:
    """How it ended. `outcome`: exit code, text and whether other ranks were lost, as the rank wrote it."""

    rank: int
    exit_code: int
    logs: str
    outcome: tuple[int, str, bool] | None = field(default=None)
    out_of_memory: str | None = None
    """What the kernel's out-of-memory killer did on its machine meanwhile, if it did and tells."""


class RankActor:
    """Two calls at a time: `run` until the process ends, `poll` meanwhile."""

    def __init__(self) -> None:
        self.private = Path(tempfile.mkdtemp(prefix="scale-ray-"))
        self.stop_file = self.private / "stop"
        self.process: subprocess.Popen[bytes] | None = None
        self.task: Task | None = None
        self.heard = time.monotonic()
        threading.Thread(target=self._watch_driver, daemon=True).start()

    def where(self) -> dict[str, Any]:
        """Node, a free port there, and the GPUs that Ray gave this actor."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        context = ray.get_runtime_context()
        gpus = [str(gpu) for gpu in context.get_accelerator_ids().get("GPU", [])]
        return {"node": context.get_node_id(), "port": port, "gpus": gpus}

    def run(self, task: Task) -> Result:
        """The rank, from start to end."""
        self.task = task
        outcome, log = self.private / "outcome.json", self.private / f"rank-{task.rank}.log"
        interface = interface_of(task.address)
        added = rank_environment(os.environ, task.ranks_here, self.private, interface)
        control = {"SCALE_OUTCOME": str(outcome), "SCALE_STOP_FILE": str(self.stop_file), PARENT: str(os.getpid())}
        killer = OutOfMemoryKiller()
        with log.open("wb") as file:
            # in this thread, which waits for it: Linux ties the child to the life of the thread
            self.process = subprocess.Popen(
                [sys.executable, *task.command],
                env=os.environ | added | task.environment | control,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = self.process.wait()
        written = read_outcome(outcome)
        said = None if written is None else (written.exit_code, written.text, written.lost)
        return Result(task.rank, code, self._keep(log, task), said, killer.said())

    def poll(self, offset: int | None, stop: bool) -> bytes:
        """What the rank printed from `offset` on, if asked. Shows that the driver lives, and may tell the rank to stop."""
        self.heard = time.monotonic()
        if stop:
            self.stop_file.touch()
        for log in self.private.glob("rank-*.log") if offset is not None else ():
            with log.open("rb") as file:
                file.seek(offset or 0)
                return file.read(1 << 20)
        return b""

    def clean(self) -> None:
        """Remove what is left on this machine, but for what NCCL's flight recorder wrote of a rank that hangs."""
        if self.task is not None:
            self._keep_traces(self.task)
        shutil.rmtree(self.private, ignore_errors=True)

    def _keep_traces(self, task: Task) -> None:
        """Into the run folder. They are written on this machine, as a refused config must not leave a run folder."""
        if task.run.is_dir():
            for trace in self.private.glob("nccl_trace_rank_*"):
                with suppress(OSError):
                    task.logs.mkdir(parents=True, exist_ok=True)
                    shutil.copy(trace, task.logs)

    def _keep(self, log: Path, task: Task) -> str:
        self._keep_traces(task)
        if task.run.is_dir() and task.rank != 0:
            with suppress(OSError):
                task.logs.mkdir(parents=True, exist_ok=True)
                return str(shutil.copy(log, task.logs))
        return "this output" if task.rank == 0 else f"{socket.gethostname()}:{log}"

    def _watch_driver(self) -> None:
        while True:
            time.sleep(1)
            if time.monotonic() - self.heard < ORPHAN_SECONDS:
                continue
            self.stop_file.touch()
            if self.process is None or self.process.poll() is not None:
                with suppress(Exception):  # another rank did it, or the cluster is going down
                    ray.util.remove_placement_group(ray.util.get_current_placement_group())
                os._exit(0)
