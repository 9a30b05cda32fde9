"""Stop on request at the next step boundary, all ranks at the same one."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType

from scale.parallel.ranks import Ranks


class StopSignal:
    """Context in which SIGTERM, SIGUSR1 and Ctrl-C set `reason` instead of killing; a second Ctrl-C interrupts at once.

    So does a `file` as soon as it exists: launchers that cannot send signals to ranks make one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, ranks: Ranks | None = None, file: Path | None = None) -> None:
        self.ranks, self.file = ranks, file
        self.reason: str | None = None

    def __enter__(self) -> StopSignal:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            self._before = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
