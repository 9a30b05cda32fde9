"""Rows of JSONL, one object per line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scale.data.files import one_line
from scale.data.lines import byte_lines, decode, head
from scale.data.recognise import markup
from scale.errors import UsageError

ENDINGS = (".jsonl", ".ndjson")


class _GivenTwice(ValueError):
    pass


def object_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """("path:line", line) of every line that is not blank. Raises UsageError for files that are no JSONL at all."""
    start = head(path)
    if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise UsageError(
            f"{path}: is a JSON array, expected one object per line; convert it: jq -c '.[]' {path} > rows.jsonl"
        )
    if (page := markup(start)) is not None:
        raise UsageError(f"{path}: is {page}, expected one JSON object per line")
    for n, raw in byte_lines(path):
        if raw.strip():
            yield f"{path}:{n}", raw


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """One line of JSONL. Raises UsageError for what is no JSON object, and for a key that is given twice."""
    text = decode(raw, where).strip()
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except _GivenTwice as error:
        raise UsageError(f"{where}: key {error} is given twice in one object; which one counts?") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: {_fault(error, text)}: {text[:60]!r}") from None
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{where}: not readable JSON: {one_line(error)}") from None
    if isinstance(value, list):
        raise UsageError(f"{where}: expected a JSON object {{...}}, found {text[:40]!r} (an array)")
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected a JSON object {{...}}, found {text[:40]!r}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise _GivenTwice(repr(next(name for i, name in enumerate(names) if name in names[:i])))
    return made


def _fault(error: json.JSONDecodeError, text: str) -> str:
    if error.pos >= len(text) or error.msg.startswith("Unterminated"):
        return "the JSON object is cut off (it must stand on one line)"
    rest = text[error.pos :].strip()
    if error.msg == "Extra data" and rest == ",":
        return "not JSON: a comma after the object"
    if error.msg == "Extra data" and "\r" in text:
        return "not JSON: lines end with \\r alone (tr '\\r' '\\n' mends that)"
    if error.msg == "Extra data":
        return f"not JSON: more after the object, at column {error.colno} (one object per line)"
    return f"not JSON: {error.msg} at column {error.colno}"
