"""Stop on request at the next step boundary, all ranks at the same one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from scale.errors import EXIT_INTERRUPTED, EXIT_STOPPED

if TYPE_CHECKING:  # torch would delay the moment from which signals are heard
    from scale.parallel.ranks import Ranks

UNWIND_SECONDS = 1.0
"""A signal so soon after one that interrupted is not heard: what is half-written is being removed."""


class StopSignal:
    """Context in which SIGTERM, SIGUSR1, SIGHUP and Ctrl-C stop a run instead of killing the process.

    `training` (from the start, unless the phase is set): they set `reason`, which is looked at between steps; a second
    Ctrl-C raises KeyboardInterrupt. `before` there is nothing to save: the first one raises KeyboardInterrupt. `after` the
    outcome stands: none has any effect. A `file` is a signal too, as soon as it exists: launchers that cannot send
    signals to ranks make one. Who started the process under nohup wants no SIGHUP to be heard.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

    def __init__(
        self,
        ranks: Ranks | None = None,
        file: Path | None = None,
        phase: Literal["before", "training", "after"] = "training",
    ) -> None:
        self.ranks, self.file, self.phase = ranks, file, phase
        self.reason: str | None = None
        self.exit_code: int | None = None
        """Of a process that was interrupted."""
        self._installed: dict[signal.Signals, object] = {}
        self._raised_at: float | None = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            for number in self.SIGNALS:
                before = signal.getsignal(number)
                if number != signal.SIGHUP or before != signal.SIG_IGN:
                    self._installed[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        while self._installed:
            number, handler = self._installed.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def training(self, ranks: Ranks, file: Path | None) -> Iterator[StopSignal]:
        """The phase of training, within a process that hears signals from its start to its end, or by itself."""
        self.ranks, self.file, self.phase = ranks, file, "training"
        with ExitStack() as alone:
            if not self._installed:
                alone.enter_context(self)
            try:
                yield self
            finally:
                self.phase = "after"

    def asked(self) -> str | None:
        """Why to stop now, or None: the same answer on every rank. Collective, so call it once a step."""
        if self.file is not None and (self.ranks is None or self.ranks.rank == 0) and self.file.exists():
            self.reason = self.reason or "the launcher asks to stop"
        mine = self.reason
        if self.ranks is None:
            return mine
        if not self.ranks.any(
            mine is not None
        ):  # one that comes meanwhile is for the next step: the others heard of none
            return None
        self.reason = mine or "signal on another rank"
        return self.reason

    def code_of(self, number: int) -> int:
        """Exit code of a process that this signal ends at once. Before training, a scheduler that stops it may start it
        again."""
        return EXIT_STOPPED if self.phase == "before" and number != signal.SIGINT else EXIT_INTERRUPTED

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.phase == "after":
            return
        now = self.phase == "before" or (number == signal.SIGINT and self.reason is not None)
        self.reason = self.reason or signal.Signals(number).name
        if not now or (self._raised_at is not None and time.monotonic() - self._raised_at < UNWIND_SECONDS):
            return
        self._raised_at = time.monotonic()
        self.exit_code = self.exit_code or self.code_of(number)
        raise KeyboardInterrupt


def stop_file() -> Path | None:
    """The file by which a launcher asks the ranks to stop: SCALE_STOP_FILE in the environment."""
    name = os.environ.get("SCALE_STOP_FILE")
    return Path(name) if name else None
