"""`launch/torchrun.sh`: run the ranks of this node under torchrun, start them again when that helps, say why they ended."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from scale.cluster.agent import Order
from scale.cluster.attempts import Attempt, Ended, Outcome, Stop, judge, read_outcome, run_attempts, say
from scale.cluster.environment import rank_environment
from scale.cluster.options import Launch, interface_of, read_launch
from scale.errors import EXIT_FAILED, ScaleError
from scale.files import write_atomic

AGREE_SECONDS = 30
"""How long a node whose ranks lost others waits for the node that knows why to start a new attempt."""


@dataclass(frozen=True)
class Nodes:
    """This node among those of the run."""

    launch: Launch
    command: list[str]
    """Of a rank, without the Python interpreter and without `--split`."""
    run: Path
    """The run folder, on a file system that all nodes share. It may not exist yet."""

    @property
    def shared(self) -> Path:
        """Folder, beside the run, in which the supervisors of all nodes leave each other notes."""
        return self.run.parent / f".{self.run.name}.launch-{self.launch.identity}"

    @property
    def stop_file(self) -> Path:
        """Ranks stop after a checkpoint as soon as this file exists. A scheduler's script may name its own."""
        given = os.environ.get("SCALE_STOP_FILE")
        return Path(given) if given else self.shared / "stop"

    def retry_file(self, attempt: Attempt) -> Path:
        """Written by the node that starts again after `attempt`; holds the next split."""
        return self.shared / f"retry.{attempt.number}"


def supervise(nodes: Nodes) -> int:
    """Run this node's part until the end. Prints the first error last; returns the exit code (0, 1, 2 or 75)."""
    supervisor = _Supervisor(nodes)
    first_node = nodes.launch.node_rank == 0
    if first_node:  # notes of an earlier run with the same identity; no rank starts anywhere before this node joins
        shutil.rmtree(nodes.shared, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="scale-") as private:
        supervisor.private = Path(private)
        try:
            with Stop(supervisor.ask, supervisor.kill) as stop:
                supervisor.stop = stop
                return run_attempts(supervisor.run, stop, supervisor.agree)
        finally:
            supervisor.kill()
            if first_node:
                shutil.rmtree(nodes.shared, ignore_errors=True)


class _Supervisor:
    """One agent at a time, and what is known about it."""

    stop: Stop
    private: Path

    def __init__(self, nodes: Nodes):
        self.nodes = nodes
        self.started = f"{datetime.now():%Y%m%d_%H%M%S}"
        self.agent: subprocess.Popen[bytes] | None = None

    def ask(self) -> None:
        """Tell the ranks of all nodes to stop after a checkpoint."""
        self.nodes.shared.mkdir(parents=True, exist_ok=True)
        self.nodes.stop_file.touch()

    def kill(self) -> None:
        """End the agent at once, and with it its ranks, which are tied to its life."""
        if self.agent is not None and self.agent.poll() is None:
            self.agent.kill()  # without waiting: a signal handler calls this while `run` waits

    def run(self, attempt: Attempt) -> Outcome:
        """One attempt, from start to end."""
        launch = self.nodes.launch
        folder = self.private / str(attempt.number)
        folder.mkdir()
        logs = self._logs_folder(attempt)
        report, outcome = folder / "report.json", folder / "outcome.json"
        split = ["--split", str(attempt.split)] if attempt.split > 1 else []
        order = Order(
            parent=os.getpid(),
            nodes=launch.nodes,
            ranks=launch.ranks_per_node,
            identity=f"{launch.identity}.{attempt.number}",
            host=launch.host,
            port=launch.port + attempt.number if launch.port else 0,
            local_addr=launch.local_addr,
            join_seconds=launch.join_seconds,
            command=[*self.nodes.command, *split],
            logs=str(logs),
            report=str(report),
        )
        if launch.nodes * launch.ranks_per_node > 1:
            say(f"{launch.ranks_per_node} ranks on this node; what ranks other than 0 print: {logs}")
        self.agent = subprocess.Popen(
            order.start(), env=self._environment(outcome, logs), start_new_session=True, stdin=subprocess.DEVNULL
        )
        code = self.agent.wait()
        return self._ended(code, report, read_outcome(outcome), self._keep(logs, attempt))

    def agree(self, attempt: Attempt, outcome: Outcome, then: Attempt | None) -> Attempt | None:
        """With several nodes: tell the others about a new attempt, or wait whether one of them starts one."""
        if self.nodes.launch.nodes == 1:
            return then
        note = self.nodes.retry_file(attempt)
        if then is not None:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(note, str(then.split))
            return then
        if outcome.exit_code != EXIT_FAILED or not outcome.lost:
            return None
        deadline = time.monotonic() + AGREE_SECONDS
        while time.monotonic() < deadline and not self.stop.asked:
            # the list of names: network file systems may remember for long that one file did not exist
            if note.parent.is_dir() and note in note.parent.iterdir():
                return Attempt(attempt.number + 1, int(note.read_text(encoding="utf-8")))
            time.sleep(0.2)
        return None

    def _environment(self, outcome: Path, logs: Path) -> dict[str, str]:
        launch = self.nodes.launch
        added = rank_environment(os.environ, launch.ranks_per_node, logs, interface_of(launch.local_addr))
        control = {"SCALE_OUTCOME": str(outcome), "SCALE_STOP_FILE": str(self.nodes.stop_file)}
        return {**os.environ, **added, **control}

    def _log_name(self, attempt: Attempt) -> str:
        node = f".node{self.nodes.launch.node_rank}" if self.nodes.launch.nodes > 1 else ""
        return f"{self.started}{node}.{attempt.number}"

    def _logs_folder(self, attempt: Attempt) -> Path:
        """In the run folder, or in a temporary one while there is no run: a refused config must not leave a folder."""
        if self.nodes.run.is_dir():
            with suppress(OSError):
                folder = self.nodes.run / "logs" / self._log_name(attempt)
                folder.mkdir(parents=True, exist_ok=True)
                return folder
        return Path(tempfile.mkdtemp(prefix=f"scale-logs-{self._log_name(attempt)}-"))

    def _keep(self, logs: Path, attempt: Attempt) -> Path:
        """Move logs into the run folder once there is one. Returns where they are."""
        target = self.nodes.run / "logs" / self._log_name(attempt)
        if logs == target or not self.nodes.run.is_dir():
            return logs
        with suppress(OSError, shutil.Error):
            shutil.copytree(logs, target, dirs_exist_ok=True)
            shutil.rmtree(logs)
            say(f"{logs} is now {target}")
            return target
        return logs

    def _ended(self, code: int, report: Path, written: Outcome | None, logs: Path) -> Outcome:
        try:
            content = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {"problem": f"torchrun's agent ended with {code} (logs: {logs}/agent.log)"}
        if "problem" not in content:
            return judge(written, [Ended(*pair) for pair in content["ended"]], str(logs), self.stop.asked)
        if written is not None:
            return written
        launch = self.nodes.launch
        if launch.nodes == 1:
            return Outcome(EXIT_FAILED, content["problem"])
        where = f"{launch.host}:{launch.port}"
        return Outcome(
            EXIT_FAILED,
            f"{launch.nodes} nodes did not meet at {where} within {launch.join_seconds} s (is each started with the same "
            f"--nodes, --host and --port, and is the port open? `launch/preflight.py` names it): {content['problem']}",
        )


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Entry point of launch/torchrun.sh. Returns the exit code."""
    try:
        launch, args = read_launch(arguments, environment)
        nodes = Nodes(launch, *_work(args, launch))
    except ScaleError as error:
        print(f"scale: error: {error}", file=sys.stderr)
        return error.exit_code
    return supervise(nodes)


def _work(args: argparse.Namespace, launch: Launch) -> tuple[list[str], Path]:
    """Command of a rank and its run folder. Reads the config, so that a wrong one is refused before anything starts."""
    from scale.cluster.work import train_command

    return train_command(args.config, args.overrides, args.allow_change, args.new, several=launch.nodes > 1)


if __name__ == "__main__":
    sys.exit(main())
