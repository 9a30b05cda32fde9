"""manifest.json: what a checkpoint folder holds, down to the hash of every file and of the manifest itself.

It is written last and read first. Its bytes are canonical (one possible spelling), so any flipped byte shows: either it
is no JSON any more, or it is spelled differently from what our own writer makes of it, or its hash does not match.
The hashes find damage, not forgery: whoever writes a folder can write a matching manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scale.errors import ScaleError

FORMAT = 1
MANIFEST = "manifest.json"


class DamagedCheckpoint(ScaleError):
    """A checkpoint folder that is not what was written: names the folder, the file and what is wrong with it."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """Global shape and dtype (`float32`) of one tensor."""

    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a checkpoint before its other files are opened. `created`: UTC, ISO 8601."""

    step: int
    val_loss: float | None
    created: str
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write to `folder`; the caller forces it to disk."""
        (folder / MANIFEST).write_bytes(_canonical(asdict(self)))

    @classmethod
    def describe(
        cls, step: int, val_loss: float | None, tensors: Mapping[str, TensorEntry], files: Mapping[str, FileEntry]
    ) -> Manifest:
        """The manifest of a folder whose other files are all written."""
        return cls(step, val_loss, datetime.now(UTC).isoformat(timespec="seconds"), dict(files), dict(tensors))


def entry_of(path: Path) -> FileEntry:
    """Size and hash of a file as it is now."""
    return FileEntry(path.stat().st_size, _sha256(path))


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json alone. Raises DamagedCheckpoint."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror}") from None
    try:
        body = json.loads(raw)
        body.pop("sha256")
        same = _canonical(body) == raw
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        same = False
    if not same:
        raise DamagedCheckpoint(f"{path}: its content does not match its own SHA-256")
    if body.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path}: format {body.get('format')!r} is not {FORMAT}, the one this version reads")
    try:
        files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
        tensors = {name: TensorEntry(**entry) for name, entry in body.pop("tensors").items()}
        return Manifest(**body, files=files, tensors=tensors)
    except (KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{path}: is not a manifest of format {FORMAT}") from None


def verify(folder: Path, part: int = 0, parts: int = 1) -> Manifest:
    """Check every byte of the folder against its manifest, opening nothing but to hash it. Raises DamagedCheckpoint.

    With several `parts`, each hashes its share of the files: ranks divide the work.
    """
    manifest = read_manifest(folder)
    expected = {MANIFEST, *manifest.files}
    found = set(os.listdir(folder))  # noqa: PTH208 (names, hidden ones too)
    for name in sorted(expected - found):
        raise DamagedCheckpoint(f"{folder / name}: is missing")
    for name in sorted(found - expected):
        raise DamagedCheckpoint(f"{folder / name}: is not in the manifest")
    for name, entry in sorted(manifest.files.items())[part::parts]:
        check_file(folder / name, entry)
    return manifest


def check_file(path: Path, entry: FileEntry) -> None:
    """Whether a file is still what its entry says. Raises DamagedCheckpoint."""
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode):
            raise DamagedCheckpoint(f"{path}: is not a regular file")
        if info.st_size != entry.bytes:
            raise DamagedCheckpoint(f"{path}: has {info.st_size} bytes instead of {entry.bytes}")
        if _sha256(path) != entry.sha256:
            raise DamagedCheckpoint(f"{path}: its content does not match its SHA-256")
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _canonical(body: Mapping[str, Any]) -> bytes:
    """The one spelling of `body`, with the SHA-256 of the spelling without it added."""
    digest = hashlib.sha256(_spell(body)).hexdigest()
    return _spell({**body, "sha256": digest})


def _spell(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")
