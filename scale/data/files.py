"""Finding input files, and saying in one line what another library found wrong with them."""

from __future__ import annotations

import glob
from pathlib import Path

from scale.errors import UsageError


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


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error of somebody else's library."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]
