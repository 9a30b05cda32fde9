"""Ways to damage a file, and a reader of advice who does what the line says."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path


def cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path, other: Path) -> None:
    """One byte in the middle; an empty file gets one."""
    raw = bytearray(path.read_bytes()) or bytearray(1)
    raw[len(raw) // 2] ^= 0x15
    path.write_bytes(raw)


def remove(path: Path, other: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    """With the same file of another run."""
    shutil.copy(other, path)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {f.__name__: f for f in (cut, empty, garble, remove, swap)}


def ways_out(line: str) -> list[list[str]]:
    """Every way out that an error names, as the words of a command."""
    ways = [shlex.split(command) for command in re.findall(r"(?:mv|rm -r) [^;()\n]+", line)]
    if found := re.search(r"error: (\S+): .*remove the folder to start afresh", line):
        ways.append(["rm", "-r", found[1]])
    return ways


def follow(way: list[str]) -> None:
    """Do what a way out says."""
    if way[0] == "mv":
        Path(way[1]).rename(way[2])
    else:
        for place in way[2:]:
            shutil.rmtree(place)
