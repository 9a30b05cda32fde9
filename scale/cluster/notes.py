"""What the launchers of one run's nodes leave each other in a folder that all see: a request to stop, a new attempt."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from scale.cluster.attempts import Attempt
from scale.cluster.options import Launch
from scale.errors import ScaleError, UsageError
from scale.files import write_atomic


class Notes:
    """Notes in a folder, which the launcher of the first node makes and removes."""

    def __init__(self, folder: Path):
        self.folder = folder
        given = os.environ.get("SCALE_STOP_FILE")
        self.stop_file = Path(given) if given else folder / "stop"
        """Ranks stop after a checkpoint as soon as this file exists. A scheduler's script may name its own."""

    def ask_to_stop(self) -> None:
        """Tell the ranks of all nodes to stop after a checkpoint. Without the folder there are none any more."""
        with suppress(FileNotFoundError):
            self.stop_file.touch()

    def announce(self, attempt: Attempt, then: Attempt) -> bool:
        """Tell the other nodes that `attempt` is over and `then` follows. False if the first node is gone."""
        if not self.folder.is_dir():
            return False
        write_atomic(self._retry_file(attempt), str(then.split))
        return True

    def announced(self, attempt: Attempt) -> Attempt | None:
        """What follows on `attempt`, if a node has said so."""
        note = self._retry_file(attempt)
        with suppress(OSError, ValueError):
            # network file systems may remember for long that one file did not exist, and for long that it did: so look
            # through the list of names, and open the file
            if note in note.parent.iterdir():
                return Attempt(attempt.number + 1, int(note.read_text(encoding="utf-8")))
        return None

    def _retry_file(self, attempt: Attempt) -> Path:
        return self.folder / f"retry.{attempt.number}"


@contextmanager
def notes_of(launch: Launch, run: Path, private: Path) -> Iterator[Notes]:
    """The notes of a launch. One node keeps them in its own folder, `private`; several beside the run, which they share.

    Raises UsageError if another launcher works with them.
    """
    if launch.nodes == 1:
        yield Notes(private)
        return
    folder = run.parent / f".{run.name}.launch-{launch.identity}"
    if launch.node_rank != 0:
        yield Notes(folder)
        return
    with _owned(folder):
        yield Notes(folder)
    with suppress(
        OSError
    ):  # NFS keeps a file that is open when it is deleted, and thereby the folder, until it is closed
        folder.rmdir()


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Make or take over the folder, empty, and remove what is in it at the end. A killed owner's lock ends with it."""
    with _locked(folder) as owner:
        for old in folder.iterdir():
            if old.name != "owner":
                old.unlink()
        owner.truncate(0)
        owner.write(f"process {os.getpid()} on {socket.gethostname()}")
        owner.flush()
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    """The file `owner` in the folder, under a POSIX lock, which network file systems pass on to other machines."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / "owner").open("a+", encoding="utf-8")
        except FileNotFoundError:  # its owner removed it in this moment
            continue
        except OSError as error:
            raise ScaleError(f"{folder}: cannot be made: {error.strerror} (choose another runs_dir)") from None
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UsageError(
                    f"{folder}: {file.read() or 'another process'} is launching this run: stop it or choose another name"
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat((folder / "owner").stat(), os.fstat(file.fileno())):
                    yield file
                    return
