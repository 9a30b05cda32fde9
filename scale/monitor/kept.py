"""Whether metrics.jsonl still holds the rows that a checkpoint counted: their number and one hash over their lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scale.errors import ScaleError


class BrokenRows(ScaleError):
    """metrics.jsonl is not what was written into it: names the line, or what is missing."""


class Kept:
    """A running sum over lines: how many, and the SHA-256 of all of them."""

    def __init__(self) -> None:
        self.rows, self._hash = 0, hashlib.sha256()

    def add(self, line: bytes) -> None:
        self.rows += 1
        self._hash.update(line + b"\n")

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "sha256": self._hash.hexdigest()}


def first_lines(path: Path, step: int, kept: Mapping[str, Any]) -> list[str]:
    """The lines that `kept` summed up at `step`, which come first in the file; none if no row up to `step` is there.

    Raises BrokenRows where some are there but not all, or others.
    """
    lines = path.read_bytes().split(b"\n")
    sums = Kept()
    for line in lines[: kept["rows"]]:
        sums.add(line)
    if sums.to_json() == kept:
        return [line.decode("ascii") for line in lines[: kept["rows"]]]
    steps = [_step(line) for line in lines if line]
    there = sum(found is not None and found <= step for found in steps)
    if there == 0 and None not in steps:
        return []
    broken = next((number for number, line in enumerate(lines, 1) if line and _step(line) is None), None)
    if broken is not None and broken <= kept["rows"]:
        raise BrokenRows(f"{path}: line {broken} is no metrics row")
    if there != kept["rows"]:
        raise BrokenRows(f"{path}: {there} rows up to step {step}, where {kept['rows']} were written")
    raise BrokenRows(f"{path}: the {there} rows up to step {step} are not the ones that were written")


def _step(line: bytes) -> int | None:
    """The step of a row; None if the line is no row."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if type(step) is int else None
