"""Folders with a list of their files' hashes in them, so that a later reader sees what was damaged or exchanged since."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scale.files import locked, new_folder, write_atomic

SEAL = "files.json"
ALWAYS_HASHED = 1 << 26
"""Bytes up to which a file is hashed every time; larger ones are, where their size or time of change differ from the list."""


def seal(folder: Path) -> None:
    """List the files of a folder that is complete."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL]
    listed = {str(path.relative_to(folder)): _entry(path) for path in files}
    write_atomic(folder / SEAL, json.dumps(listed, indent=1) + "\n")


def broken_seal(folder: Path) -> str | None:
    """Which file is not what was listed, in one line; None if all are, or if there is no list (older versions)."""
    if not (folder / SEAL).exists():
        return None
    try:
        listed = json.loads((folder / SEAL).read_bytes())
        entries = [(name, int(e["bytes"]), str(e["sha256"]), int(e["mtime_ns"])) for name, e in listed.items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{folder / SEAL}: is not a list of files any more"
    for name, size, digest, changed in entries:
        path = folder / name
        try:
            found = path.stat()
            if found.st_size != size:
                return f"{path}: has {found.st_size} bytes instead of {size}"
            trusted = found.st_mtime_ns == changed and size > ALWAYS_HASHED
            if not trusted and _sha256(path) != digest:
                return f"{path}: its content does not match its SHA-256"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
    return None


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cached_folder(target: Path, write: Callable[[Path], object], say: Callable[[str], None] = _to_stderr) -> None:
    """Run `write(folder)` unless `target` is there already, and again where it was damaged since, which is said; two processes
    never write it at once."""
    if target.exists() and broken_seal(target) is None:
        return
    with locked(target.parent):
        if target.exists():
            damage = broken_seal(target)  # None: written while we waited
            if damage is None:
                return
            say(f"{damage}: the cache entry {target.name} is made anew")
            remove(target)
        with new_folder(target) as aside:
            write(aside)
            seal(aside)


def seal_hash(folder: Path) -> str | None:
    """One hash over what the list says; None without a list."""
    try:
        listed = json.loads((folder / SEAL).read_bytes())
        return hashlib.sha256(
            json.dumps({name: e["sha256"] for name, e in sorted(listed.items())}).encode()
        ).hexdigest()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_sealed(folder: Path, write: Callable[[Path], object], known: str | None = None) -> str | None:
    """Let `write` fill `folder`, unless it holds the same files already, by its list (whose `seal_hash` was `known`) or else
    byte for byte. Returns what had to be mended: the old folder is then `NAME.damaged`. Raises ScaleError or UsageError if it
    cannot be written."""
    found = seal_hash(folder)
    if found is not None and found == (known or found) and broken_seal(folder) is None:
        return None
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # left by a killed process
    with new_folder(fresh) as aside:
        write(aside)
        seal(aside)
    names = [str(path.relative_to(fresh)) for path in sorted(fresh.rglob("*")) if path.is_file() and path.name != SEAL]
    differing = [name for name in names if not _same(folder / name, fresh / name)]
    there = folder.exists()
    if there and folder.is_dir() and not differing:
        seal(folder)
        shutil.rmtree(fresh)
        return None
    damaged = folder.with_name(f"{folder.name}.damaged")
    if there:
        remove(damaged)
        os.replace(folder, damaged)  # noqa: PTH105
    os.replace(fresh, folder)  # noqa: PTH105
    if not there:
        return f"{folder}: was missing, and {damaged.name} is here: written anew" if damaged.exists() else None
    return f"{folder}: {', '.join(differing)} not what this run writes: written anew (the old folder is now {damaged.name})"


def remove(path: Path) -> None:
    """A file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _entry(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {"bytes": found.st_size, "sha256": _sha256(path), "mtime_ns": found.st_mtime_ns}


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()
