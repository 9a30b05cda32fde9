"""The end of a process that a signal ends and that does not come to its end by itself."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from scale.train.stop import StopSignal

LEAVE_SECONDS = 4.0
"""How long a process that was interrupted may take to remove what is half-written and to end."""
ECHO_SECONDS = 0.2
"""Two signals so close may be one: a child process has it too until it chose its own handlers."""
POLL_SECONDS = 0.5


class LastResort:
    """Context in which a thread watches over the signals that `stop` handles, and calls `leave` with an exit code where
    one of them should have ended the process `LEAVE_SECONDS` ago.

    Python runs handlers in the main thread alone, which may be in C code for minutes (training a tokenizer, a
    collective); and the exception that a handler raises may be lost in a library. `file`: the request of a launcher to
    stop counts as SIGTERM before training.
    """

    def __init__(self, stop: StopSignal, leave: Callable[[int], None], file: Path | None = None):
        self.stop, self.leave, self.file = stop, leave, file
        self._pipe: tuple[int, int] | None = None
        self._first: float | None = None

    def __enter__(self) -> LastResort:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(self._before)
            os.close(self._pipe[1])  # which ends the thread

    def _watch(self, pipe: int) -> None:
        while True:
            ready, _, _ = select.select([pipe], [], [], POLL_SECONDS if self.file is not None else None)
            if self.stop.phase == "before" and self.file is not None and self.file.exists():
                self.file = None
                os.kill(os.getpid(), signal.SIGTERM)
            if ready:
                heard = os.read(pipe, 64)
                if not heard:
                    os.close(pipe)
                    return
                for number in heard:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        if number not in StopSignal.SIGNALS:
            return
        now = time.monotonic()
        second = number == signal.SIGINT and self._first is not None and now - self._first > ECHO_SECONDS
        self._first = self._first or now
        timer = threading.Timer(LEAVE_SECONDS, self._check, [self.stop.code_of(number), second])
        timer.daemon = True
        timer.start()

    def _check(self, code: int, second: bool) -> None:
        if self.stop.phase == "before" or self.stop.exit_code is not None or (second and self.stop.phase != "after"):
            self.leave(self.stop.exit_code or code)
