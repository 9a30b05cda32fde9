"""Finding input files, and saying in one line what another library found wrong with them."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from scale.data.compressed import ending
from scale.errors import UsageError
from scale.files import refuse_same_place

FOLDERS = "folders (** finds what is in them)"


@dataclass
class Found:
    """Sorted files, each once, and how many there were of each kind that is left out."""

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find_files(path: str, *endings: str) -> list[Path]:
    """The files behind a file name, a folder or a glob, as `look_for` finds them."""
    return look_for(path, *endings).files


def look_for(path: str, *endings: str) -> Found:
    """The files behind a file name, a folder (those with one of `endings`, also compressed, or all) or a glob.

    Links are followed; a file that several names lead to is there once. Hidden and empty files, files with another ending
    and folders that a glob finds are left out. Raises UsageError where nothing is found or a link leads nowhere.
    """
    expanded = Path(path).expanduser()
    if expanded.is_file():
        return Found([expanded])
    if expanded.is_dir():
        found = Found()
        _keep(_inside(expanded, (), found.left_out), found, endings)
        if not found.files:
            what = f"{' or '.join(endings)} files" if endings else "files"
            raise UsageError(f"{path}: the folder holds no {what}{_told(found.left_out)}")
        return found
    if glob.has_magic(path):
        found = Found()
        _keep(_matching(expanded), found)
        if not found.files:
            raise UsageError(
                f"{path}: no file matches this pattern (working folder {Path.cwd()}){_told(found.left_out)}"
            )
        return found
    if expanded.is_symlink():
        raise _dangling(expanded)
    what = "is neither a file nor a folder" if expanded.exists() else "no such file or folder"
    raise UsageError(f"{path}: {what} (working folder {Path.cwd()})")


def _inside(folder: Path, above: tuple[tuple[int, int], ...], left_out: Counter[str]) -> Iterator[Path]:
    """Everything in a folder but folders and what is hidden, links last. A link to a folder above ends there."""
    here = _identity(folder)
    if here in above:
        return
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: (entry.is_symlink(), entry))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror})") from None
    for entry in entries:
        if entry.name.startswith("."):
            left_out["hidden files or folders"] += 1
        elif entry.is_dir():
            yield from _inside(entry, (*above, here), left_out)
        else:
            yield entry


def _matching(pattern: Path) -> Iterator[Path]:
    """What a glob finds. With ** the folders are walked here, as the standard library's glob goes round in cycles."""
    if "**" not in pattern.parts:
        return map(Path, sorted(glob.glob(str(pattern))))  # noqa: PTH207
    fixed = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    start = Path(*pattern.parts[:fixed])
    inside = _inside(start, (), Counter()) if start.is_dir() else iter(())
    return (path for path in inside if _matches(path.parts, pattern.parts))


def _keep(every: Iterator[Path], found: Found, endings: Sequence[str] = ()) -> None:
    """Move into `found` what is to be read."""
    seen: set[tuple[int, int]] = set()
    for path in every:
        if path.is_symlink() and not path.exists():
            raise _dangling(path)
        if path.is_dir():
            found.left_out[FOLDERS] += 1
        elif not path.is_file():
            found.left_out["neither files nor folders"] += 1
        elif endings and ending(path) not in endings:
            found.left_out[f"files ({path.suffix.lower() or 'without an ending'})"] += 1
        elif not path.stat().st_size:
            found.left_out["empty files"] += 1
        elif (identity := _identity(path)) in seen:
            found.left_out["files that another name leads to as well"] += 1
        else:
            seen.add(identity)
            found.files.append(path)
    found.files.sort()


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _dangling(link: Path) -> UsageError:
    return UsageError(f"{link}: is a link to {link.readlink()}, which is not there; restore that or remove the link")


def _told(left_out: Counter[str]) -> str:
    return f"; left out: {', '.join(f'{n} {what}' for what, n in left_out.items())}" if left_out else ""


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
