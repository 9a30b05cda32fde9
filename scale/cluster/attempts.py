"""What every launcher does around "start the ranks and wait": read why they ended, start again, stop on request."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from scale.cluster.killed import by_signal
from scale.errors import EXIT_FAILED, EXIT_MEMORY, EXIT_OK, EXIT_STOPPED

MEMORY_ATTEMPTS = 6
"""How often ranks start again with halved micro-batches after running out of memory."""
ECHO_SECONDS = 0.2
"""A second signal so soon is the first one again: `timeout` signals a process and then its group."""
BY_LAUNCHER = (signal.SIGTERM, signal.SIGABRT)
"""Signals by which ranks also die when another failed first: the agent's own, and NCCL's watchdog."""


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks: its number from 0, and by how much the configured micro-batches are split."""

    number: int = 0
    split: int = 1


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: exit code, and one line that names the rank where only one has something to say.

    `lost`: a rank or its machine is gone, or ranks only say that they lost another one.
    """

    exit_code: int
    text: str = ""
    lost: bool = False


@dataclass(frozen=True)
class Ended:
    """A rank process that ended; negative codes are signals. Listed in the order in which they were seen to end."""

    rank: int
    exit_code: int


def read_outcome(path: Path) -> Outcome | None:
    """What the first rank that did not complete wrote (SCALE_OUTCOME), or None. A half-written file counts as none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        code, text = int(record["exit_code"]), str(record.get("text", ""))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Outcome(code, text, bool(record.get("lost", False)))


def judge(
    written: Outcome | None, ended: list[Ended], logs: str, stopping: bool = False, out_of_memory: str | None = None
) -> Outcome:
    """Why an attempt ended: a rank's own word first, then a signal that killed one, then ranks that lost others.

    written: the outcome file; ended: processes that did not exit with 0; logs: where to read on; out_of_memory: what the
    kernel's out-of-memory killer did meanwhile, if it did and tells.
    """
    if written is not None and not written.lost:
        return written
    killed = next((e for e in ended if e.exit_code < 0 and -e.exit_code not in BY_LAUNCHER), None)
    if killed is not None:
        how = by_signal(-killed.exit_code, out_of_memory)
        return Outcome(EXIT_FAILED, f"rank {killed.rank}: {how} (logs: {logs})", lost=True)
    if stopping and ended and all(e.exit_code == -signal.SIGTERM for e in ended):
        return Outcome(EXIT_STOPPED)  # told to stop before training began: nothing to save yet
    # a rank that is told to end before training says that it was stopped, also where the agent does so over another one
    first = next((e for e in ended if e.exit_code not in (EXIT_STOPPED, -signal.SIGTERM)), None)
    if written is not None and (written.exit_code != EXIT_STOPPED or stopping or first is None):
        return written
    if not ended:
        return Outcome(EXIT_OK)
    first = first or ended[0]
    how = f"exited with {first.exit_code}" if first.exit_code > 0 else by_signal(-first.exit_code, out_of_memory)
    return Outcome(EXIT_FAILED, f"rank {first.rank}: {how} without saying why (logs: {logs})", lost=first.exit_code < 0)


class Stop:
    """Context in which the first SIGTERM, SIGINT, SIGUSR1 or SIGHUP calls `ask` and a second SIGTERM or SIGINT calls
    `kill`. Who started the process under nohup wants no SIGHUP to be heard."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, ask: Callable[[], None], kill: Callable[[], None]):
        self.ask, self.kill, self.asked, self.killed = ask, kill, False, False
        self._first = 0.0

    def __enter__(self) -> Stop:
        heard = [n for n in self.SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._first < ECHO_SECONDS:
            return
        if self.asked and number in (signal.SIGTERM, signal.SIGINT):
            self.killed = True
            self.kill()
        elif not self.asked:
            self.asked, self._first = True, time.monotonic()
            self.ask()
            with suppress(RuntimeError):  # in the middle of another line
                say(f"{signal.Signals(number).name}: stopping after a checkpoint (again: at once, without one)")


def run_attempts(
    run: Callable[[Attempt], Outcome],
    stop: Stop,
    agree: Callable[[Attempt, Outcome, Attempt | None], Attempt | None] = lambda now, outcome, then: then,
    retries: int = 0,
) -> int:
    """Start ranks until they complete, are stopped or fail for good; prints the one error line. Returns the exit code.

    agree: of several launchers, what all of them do next, given what this one would. `retries`: how often a lost rank
    or machine is answered by a new start from the last checkpoint.
    """
    attempt, memory, lost = Attempt(), 0, 0
    while True:
        outcome = run(attempt)
        then: Attempt | None = None
        if not stop.asked and outcome.exit_code == EXIT_MEMORY and memory < MEMORY_ATTEMPTS:
            then = Attempt(attempt.number + 1, attempt.split * 2)
        elif not stop.asked and outcome.exit_code == EXIT_FAILED and outcome.lost and lost < retries:
            then = Attempt(attempt.number + 1, attempt.split)
        if not stop.asked:
            then = agree(attempt, outcome, then)
        if then is None or stop.asked:
            return finish(outcome, stop)
        memory += then.split > attempt.split
        lost += then.split == attempt.split
        smaller = f", micro-batches split by {then.split}" if then.split > attempt.split else ""
        say(f"{outcome.text}; starting again from the last checkpoint{smaller} (attempt {then.number + 1})")
        attempt = then


def finish(outcome: Outcome, stop: Stop) -> int:
    """Print why all ended, if that was not wanted; the exit code of the launcher."""
    if stop.killed:
        outcome = Outcome(EXIT_FAILED, "killed by a second signal; the last checkpoint is intact")
    if outcome.exit_code not in (EXIT_OK, EXIT_STOPPED):
        sys.stdout.flush()
        print(f"scale: error: {outcome.text}", file=sys.stderr, flush=True)
    return EXIT_FAILED if outcome.exit_code == EXIT_MEMORY else outcome.exit_code


def say(text: str) -> None:
    """A line of the launcher itself."""
    print(f"scale: {text}", file=sys.stderr, flush=True)
