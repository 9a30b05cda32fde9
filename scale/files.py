"""Files that appear whole or not at all, whatever happens: written aside, forced to disk, put in place by one rename."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, TypedDict

from scale.errors import ScaleError, UsageError


def fsync(path: Path) -> None:
    """Force a file, or the list of names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8): at any instant, and after a power cut, it is wholly old or wholly new.

    One writer per file: what a killed one left beside it, the next write overwrites.
    Raises ScaleError if it cannot be written (disk full, read-only folder).
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)  # noqa: PTH105 (the call that the crash tests watch)
        fsync(path.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise ScaleError(
            f"{path}: cannot be written: {error.strerror or error} (free the disk or check rights)"
        ) from None
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn failures of writing `target` into one line: full disk, read-only folder. An interruption says what was lost."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or f"{target}: nothing was kept") from None
    except ScaleError:
        raise
    except Exception as error:
        number = _os_error_number(error)
        if number is None:
            raise
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise ScaleError(
                f"{target}: the disk is full; free some space or write elsewhere; nothing was kept"
            ) from None
        raise UsageError(f"{target}: cannot be written ({os.strerror(number)}); choose another place") from None


def _os_error_number(error: Exception) -> int | None:
    """Of an OSError, and of what libraries in Rust (tokenizers, safetensors) make of one."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def refuse_same_place(inputs: Iterable[str | Path], output: str | Path) -> None:
    """Raises UsageError where writing `output` would replace an input or add to a folder that is read.

    That is, where `output` is one of `inputs`, holds one, or lies in one; links and relative paths are followed.
    """
    target = Path(output).expanduser().resolve()
    for given in inputs:
        source = Path(given).expanduser().resolve()
        if target == source or (target.exists() and source.exists() and target.samefile(source)):
            raise UsageError(f"{output}: is the input itself ({given}); choose another place")
        if source.is_relative_to(target):
            raise UsageError(f"{output}: holds the input {given}; choose another place")
        if target.is_relative_to(source):
            raise UsageError(f"{output}: lies in the input {given}; choose another place")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well and vanishes when it does not.

    One that a killed process left vanishes when the next one begins to write the same target.
    """
    with explained(target), ExitStack() as held:
        remove_leftovers(target)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"{target}: exists already; choose another place or delete it first")
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = _claimed(lambda: Path(tempfile.mkdtemp(**_beside(target))), held)
        try:
            yield aside
            for file in (*aside.rglob("*"), aside):
                fsync(file)
            aside.chmod(0o755)  # mkdtemp makes folders that only their owner can read
            aside.replace(target)
            fsync(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def new_files(*targets: Path) -> Iterator[list[IO[bytes]]]:
    """Open temporary siblings that all replace their targets when the block ends well. Leftovers go as in `new_folder`."""
    with explained(targets[0]), ExitStack() as held:
        asides: list[Path] = []
        files: list[IO[bytes]] = []
        try:
            for target in targets:
                remove_leftovers(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                asides.append(_claimed(partial(_new_file, target), held))
                files.append(asides[-1].open("r+b"))
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            for aside, target in zip(asides, targets, strict=True):
                aside.chmod(0o644)
                aside.replace(target)
                fsync(target.parent)
        finally:
            for aside in asides:
                aside.unlink(missing_ok=True)
            for file in files:
                with suppress(OSError):  # flushing to a full disk fails once more; the file is gone already
                    file.close()


class _Beside(TypedDict):
    prefix: str
    suffix: str
    dir: Path


def _beside(target: Path) -> _Beside:
    """How `tempfile` is to name what is written for a target."""
    return {"prefix": f".{target.name}.", "suffix": ".tmp", "dir": target.parent}


def _new_file(target: Path) -> Path:
    handle, name = tempfile.mkstemp(**_beside(target))
    os.close(handle)
    return Path(name)


def _claimed(make: Callable[[], Path], held: ExitStack) -> Path:
    """A new temporary file or folder, locked until `held` closes: nobody takes it for a leftover while this process, or
    one that it forked, is alive."""
    while True:
        path = make()
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # taken for a leftover before it was locked
            continue
        held.callback(os.close, handle)
        with suppress(OSError):  # a file system without locks, where leftovers are never removed
            fcntl.flock(handle, fcntl.LOCK_EX)
        if path.exists():
            return path


def remove_leftovers(target: Path) -> None:
    """Remove the temporary files and folders of `target` whose writers are dead: those that no process has locked."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.tmp")
    for path in list(target.parent.iterdir()) if target.parent.is_dir() else []:
        if not name.fullmatch(path.name):
            continue
        with suppress(OSError):  # locked, or on a file system without locks, or gone in the meantime
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`/.lock against other processes; waits for whoever holds it. A killed holder frees it."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


_FLOAT = "$float"
"""The only key of what stands for a number that JSON has no spelling for."""


def to_json(value: Any) -> str:
    """`value` as strict JSON that `from_json` turns back into the same numbers: NaN and the infinities become
    `{"$float": "nan"}` and so on, as JSON knows none of them."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_spelled(value), allow_nan=False)


def from_json(text: str) -> Any:
    """What was given to `to_json`, tuples as lists. Raises ValueError for what is no JSON."""
    return json.loads(text, object_hook=_float_of)


def _spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    return value


def _float_of(found: dict[str, Any]) -> Any:
    return float(found[_FLOAT]) if found.keys() == {_FLOAT} else found
