"""Files that survive a crash: written aside, forced to disk, put in place by one rename."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from scale.errors import ScaleError


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
