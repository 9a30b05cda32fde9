"""`launch/torchrun.sh`: run the ranks of this node under torchrun, start them again when that helps, say why they ended."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
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
from scale.cluster.killed import OutOfMemoryKiller
from scale.cluster.notes import Notes, notes_of
from scale.cluster.options import Launch, interface_of, read_launch
from scale.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MEMORY, EXIT_STOPPED, EXIT_USAGE, ScaleError
from scale.streams import guarded_output
from scale.train.stop import StopSignal

POLL_SECONDS = 0.5
AGREE_SECONDS = 30
"""How long a node whose ranks lost others waits for the node that knows why to start a new attempt."""
MEMORY_SECONDS = 5
"""How long other ranks of a node may go on once one is out of memory: they wait for it, and ignore SIGTERM for 30 s."""


@dataclass(frozen=True)
class Nodes:
    """This node among those of the run."""

    launch: Launch
    command: list[str]
    """Of a rank, without the Python interpreter and without `--split`."""
    run: Path
    """The run folder, on a file system that all nodes share. It may not exist yet."""


def supervise(nodes: Nodes, early: StopSignal | None = None) -> int:
    """Run this node's part until the end. Prints the first error last; returns the exit code (0, 1, 2 or 75).

    `early`: what hears signals until this does. Raises UsageError if another launcher has this run, ScaleError if its
    notes cannot be written.
    """
    with (
        tempfile.TemporaryDirectory(prefix="scale-") as private,
        notes_of(nodes.launch, nodes.run, Path(private)) as notes,
    ):
        supervisor = _Supervisor(nodes, notes, Path(private))
        try:
            with Stop(supervisor.ask, supervisor.kill) as stop:
                supervisor.stop = stop
                if early is not None:
                    early.phase = "after"
                return run_attempts(supervisor.run, stop, supervisor.agree)
        finally:
            supervisor.kill()


class _Supervisor:
    """One agent at a time, and what is known about it."""

    stop: Stop

    def __init__(self, nodes: Nodes, notes: Notes, private: Path):
        self.nodes, self.notes, self.private = nodes, notes, private
        self.started = f"{datetime.now():%Y%m%d_%H%M%S}"
        self.agent: subprocess.Popen[bytes] | None = None
        self.met = nodes.launch.node_rank == 0
        """Whether the notes are of this launch: the first node clears them before it joins, so before ranks start."""
        self.too_early = False
        """Whether a stop was asked for before ranks were started, and their agent ended."""

    def ask(self) -> None:
        """Tell the ranks of all nodes to stop after a checkpoint, once there are some."""
        if self.met:
            self.notes.ask_to_stop()

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
        started, report, outcome = folder / "started", folder / "report.json", folder / "outcome.json"
        split = ["--split", str(attempt.split)] if attempt.split > 1 else []
        order = Order(
            parent=os.getpid(),
            nodes=launch.nodes,
            ranks=launch.ranks_per_node,
            identity=f"{launch.identity}.{attempt.number}",
            host=launch.host,
            port=launch.port + attempt.number if launch.port else 0,
            local_addr=launch.local_addr,
            # the others come when their agent has ended
            join_seconds=launch.join_seconds + (AGREE_SECONDS if attempt.number else 0),
            command=[*self.nodes.command, *split],
            logs=str(logs),
            started=str(started),
            report=str(report),
        )
        if launch.nodes * launch.ranks_per_node > 1:
            say(f"{launch.ranks_per_node} ranks on this node; what ranks other than 0 print: {logs}")
        self.agent = subprocess.Popen(
            order.start(), env=self._environment(outcome, logs), start_new_session=True, stdin=subprocess.DEVNULL
        )
        killer = OutOfMemoryKiller()
        code = self._wait(self.agent, attempt, started, outcome)
        if self.too_early and not self.stop.killed:
            self._tidy(logs, Outcome(EXIT_STOPPED))
            return Outcome(EXIT_STOPPED)
        if code == -signal.SIGKILL and not self.stop.killed and self.notes.announced(attempt):
            self._keep(logs, attempt)
            return Outcome(EXIT_FAILED, "a rank of another node ran out of memory", lost=True)
        logs = self._keep(logs, attempt)
        ended = self._ended(code, report, read_outcome(outcome), logs, killer.said())
        self._tidy(logs, ended)
        return ended

    def _wait(self, agent: subprocess.Popen[bytes], attempt: Attempt, started: Path, outcome: Path) -> int:
        """Exit code of the agent. Ends it where all start again anyway: ranks may notice a lost one only much later."""
        polls_left = MEMORY_SECONDS / POLL_SECONDS
        while True:
            with suppress(subprocess.TimeoutExpired):
                return agent.wait(POLL_SECONDS)
            if self.nodes.launch.nodes > 1:
                self.met = self.met or started.exists()
                if self.stop.asked:
                    self.ask()
                elif self.met and self.notes.announced(attempt):
                    self.kill()
            elif self.stop.asked and not started.exists():
                self.too_early = True
                self.kill()
            written = read_outcome(outcome)
            polls_left -= written is not None and written.exit_code == EXIT_MEMORY
            if polls_left < 0:
                self.kill()

    def agree(self, attempt: Attempt, outcome: Outcome, then: Attempt | None) -> Attempt | None:
        """With several nodes: tell the others about a new attempt, or wait whether one of them starts one."""
        if self.nodes.launch.nodes == 1:
            return then
        if then is not None:
            return then if self.notes.announce(attempt, then) else None
        if outcome.exit_code != EXIT_FAILED or not outcome.lost:
            return None
        deadline = time.monotonic() + AGREE_SECONDS
        while time.monotonic() < deadline and not self.stop.asked:
            if then := self.notes.announced(attempt):
                return then
            time.sleep(POLL_SECONDS)
        return None

    def _environment(self, outcome: Path, logs: Path) -> dict[str, str]:
        launch = self.nodes.launch
        added = rank_environment(os.environ, launch.ranks_per_node, logs, interface_of(launch.local_addr))
        control = {"SCALE_OUTCOME": str(outcome), "SCALE_STOP_FILE": str(self.notes.stop_file)}
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

    def _tidy(self, logs: Path, ended: Outcome) -> None:
        """Remove temporary logs that say no more than the last line."""
        if self.nodes.run in logs.parents:
            return
        empty = not any(file.stat().st_size for file in logs.iterdir())
        if ended.exit_code == EXIT_USAGE or (empty and str(logs) not in ended.text):
            shutil.rmtree(logs, ignore_errors=True)

    def _ended(
        self, code: int, report: Path, written: Outcome | None, logs: Path, out_of_memory: str | None
    ) -> Outcome:
        try:
            content = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {"problem": f"torchrun's agent ended with {code} (logs: {logs}/agent.log)"}
        if "problem" not in content:
            ended = [Ended(*pair) for pair in content["ended"]]
            return judge(written, ended, str(logs), self.stop.asked, out_of_memory)
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
            lost=True,  # or they met, and another one ended, with the store, before this one's ranks had started
        )


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Entry point of launch/torchrun.sh. Returns the exit code."""
    with guarded_output(goes_on=True), StopSignal(phase="before") as early:
        try:
            launch, args = read_launch(arguments, environment)
            return supervise(Nodes(launch, *_work(args, launch)), early)
        except ScaleError as error:
            print(f"scale: error: {error}", file=sys.stderr)
            return error.exit_code
        except OSError as error:
            print(f"scale: error: {error.filename or 'the launcher'}: {error.strerror or error}", file=sys.stderr)
            return EXIT_FAILED
        except KeyboardInterrupt:
            print("scale: interrupted", file=sys.stderr)
            return early.exit_code or EXIT_INTERRUPTED


def _work(args: argparse.Namespace, launch: Launch) -> tuple[list[str], Path]:
    """Command of a rank and its run folder. Reads the config, so that a wrong one is refused before anything starts."""
    from scale.cluster.work import train_command

    return train_command(
        args.config,
        args.overrides,
        args.allow_change,
        args.new,
        several=launch.nodes > 1,
        ranks=launch.nodes * launch.ranks_per_node,
        gpus=None if launch.gpus is None else (launch.ranks_per_node, launch.gpus),
    )


if __name__ == "__main__":
    sys.exit(main())
