"""The folder of one run: where each file lies, who may write to it, and how names of new runs are made."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from scale.errors import ScaleError, UsageError

_held: dict[tuple[int, Path], object] = {}
"""Folders locked by this process: (process id, folder), as a forked child inherits the dict but not the locks."""


def new_name(name: str) -> str:
    """`name` with the local date and time: NAME_YYYYmmdd_HHMMSS."""
    return f"{name}_{datetime.now():%Y%m%d_%H%M%S}"


class RunFolder:
    """Paths of a run. Whoever writes there does so within `with folder.lock():`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.run_state = self.path / "run_state.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"
        self.profile = self.path / "profile"
        self.model = self.path / "model"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder and keep everyone else out of it for the duration, within this process too.

        The lock is the operating system's: it ends with the process, however that ends (a POSIX lock, which forked data
        workers that outlive a killed trainer for a moment do not inherit). It does not bind its own process, where
        closing any other handle of the file would even drop it: that is what `_held` is for. The file of the lock
        stays, as deleting it would let two processes lock two different files.
        Raises UsageError naming the process that has it, ScaleError if the folder cannot be made.
        """
        new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            place, ours = (os.getpid(), self.path.resolve()), object()
            if _held.setdefault(place, ours) is not ours:  # one operation, so that threads cannot both pass
                raise self._taken_by(str(os.getpid()))
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            with self._open_lock() as handle:
                try:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    handle.seek(0)
                    raise self._taken_by(handle.read().strip() or "unknown") from None
                try:
                    handle.truncate(0)
                    os.pwrite(
                        handle.fileno(), str(os.getpid()).encode(), 0
                    )  # unbuffered: closing has nothing left to fail at
                except OSError as error:
                    if new:  # nobody else can be waiting for the lock of a folder that is not a run yet
                        (self.path / ".lock").unlink()
                        self.path.rmdir()
                    raise self._unwritable(error) from None
                yield
        finally:
            del _held[place]

    def _open_lock(self) -> IO[str]:
        try:
            return (self.path / ".lock").open("a+", encoding="ascii")
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> ScaleError:
        return ScaleError(f"{self.path}: no run can be written here: {error.strerror} (choose another runs_dir)")

    def _taken_by(self, owner: str) -> UsageError:
        return UsageError(f"{self.path}: process {owner} is working in this run folder: stop it or choose another name")
