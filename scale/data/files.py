"""Finding input files, and saying in one line what another library found wrong with them."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from scale.errors import UsageError
from scale.files import refuse_same_place


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


def refuse_output_among(path: str, *outputs: str | Path) -> None:
    """Raises UsageError where writing an output would replace a file behind `path`, or be read from there the next time."""
    expanded = Path(path).expanduser()
    inputs = [expanded] if expanded.exists() else find_files(path)
    for output in outputs:
        refuse_same_place(inputs, output)
        if not expanded.exists() and _matches(Path(output).absolute().parts, expanded.absolute().parts):
            raise UsageError(f"{output}: would be read as input the next time ({path}); choose another place")


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Does a glob pattern, cut into parts, find a path?"""
    if not pattern or not parts:
        return not parts and not [part for part in pattern if part != "**"]
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error of somebody else's library."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]
