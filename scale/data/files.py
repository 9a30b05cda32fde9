"""Finding input files, and writing output so that it appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from scale.errors import ScaleError, UsageError


def find_files(path: str, ending: str = "") -> list[Path]:
    """Sorted files behind a file name, a folder (its files with `ending`, no hidden ones) or a glob."""
    expanded = Path(path).expanduser()
    if expanded.is_file():
        return [expanded]
    if expanded.is_dir():
        inside = (p for p in expanded.rglob(f"*{ending}") if p.is_file())
        found = sorted(p for p in inside if not any(s.startswith(".") for s in p.relative_to(expanded).parts))
        if not found:
            raise UsageError(f"{path}: the folder holds no {ending or 'files'}{' files' if ending else ''}")
        return found
    if glob.has_magic(path):
        found = sorted(Path(p) for p in glob.glob(str(expanded), recursive=True) if Path(p).is_file())  # noqa: PTH207
        if not found:
            raise UsageError(f"{path}: no file matches this pattern (working folder {Path.cwd()})")
        return found
    raise UsageError(f"{path}: no such file or folder (working folder {Path.cwd()})")


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn failures of writing `target` into one line: full disk, read-only folder, Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        raise ScaleError(f"{target}: stopped by Ctrl-C; nothing was kept") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ScaleError(
                f"{target}: the disk is full; free some space or write elsewhere; nothing was kept"
            ) from None
        raise UsageError(f"{target}: cannot be written ({error.strerror or error}); choose another place") from None


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well and vanishes when it does not."""
    with explained(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"{target}: exists already; choose another place or delete it first")
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            yield aside
            for file in aside.rglob("*"):
                _sync(file)
            aside.chmod(0o755)  # mkdtemp makes folders that only their owner can read
            aside.replace(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def new_files(*targets: Path) -> Iterator[list[IO[bytes]]]:
    """Open temporary siblings that all replace their targets when the block ends well."""
    with explained(targets[0]):
        asides: list[Path] = []
        files: list[IO[bytes]] = []
        try:
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
                descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
                asides.append(Path(name))
                files.append(os.fdopen(descriptor, "wb"))
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            for aside, target in zip(asides, targets, strict=True):
                aside.chmod(0o644)
                aside.replace(target)
        finally:
            for aside in asides:
                aside.unlink(missing_ok=True)
            for file in files:
                with suppress(OSError):  # flushing to a full disk fails once more; the file is gone already
                    file.close()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`/.lock against other processes; waits for whoever holds it. A killed holder frees it."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def cached_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Run `write(folder)` unless `target` is there already; two processes never write it at once."""
    if target.exists():
        return
    with locked(target.parent):
        if target.exists():  # written while we waited
            return
        for stale in target.parent.glob(f".{target.name}.*.tmp"):  # left by a killed process: we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        with new_folder(target) as aside:
            write(aside)


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error of somebody else's library."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
