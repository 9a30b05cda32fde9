"""One way to write a text: NFC, lines that end with \\n, no control characters. Words stay apart."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

LINE_ENDS, BREAKS, SPACES = "line ends (\\r\\n, \\r)", "page and other breaks (to \\n)", "separators (to a space)"
CONTROLS, MARKS, HYPHENS = "control characters", "byte order marks", "soft hyphens"
COMPOSED = "texts with characters to compose (NFC)"

_LINE_END = re.compile(r"\r\n?")
_BREAK = re.compile("[\v\f\x1c\x1d\x1e\x85\u2028\u2029]")
_SPACE = re.compile("\x1f")
_HYPHEN = re.compile("\u00ad")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]+")
_MARK = re.compile("\ufeff+")


def normalised(value: Any, changes: Counter[str] | None = None) -> Any:
    """A text, or the texts inside lists and objects, normalised; `changes` counts what was changed.

    Line and page breaks become \\n, other separators a space. A control character or byte order mark between two words
    becomes a space, elsewhere it goes; so do soft hyphens, which are seen only at the end of a line. Zero-width spaces,
    joiners and marks of direction stay, as scripts need them.
    """
    if isinstance(value, str):
        return _text(value, Counter() if changes is None else changes)
    if isinstance(value, list):
        return [normalised(v, changes) for v in value]
    if isinstance(value, dict):
        return {k: normalised(v, changes) for k, v in value.items()}
    return value


def _text(text: str, changes: Counter[str]) -> str:
    if text.isascii() and text.isprintable():
        return text
    for kind, found, put in (
        (LINE_ENDS, _LINE_END, "\n"),
        (BREAKS, _BREAK, "\n"),
        (SPACES, _SPACE, " "),
        (HYPHENS, _HYPHEN, ""),
        (CONTROLS, _CONTROL, _apart),
        (MARKS, _MARK, _apart),
    ):
        text, times = found.subn(put, text)
        if times:
            changes[kind] += times
    composed = unicodedata.normalize("NFC", text)
    changes.update([COMPOSED] if composed != text else [])
    return composed


def _apart(found: re.Match[str]) -> str:
    """A space between two words, else nothing."""
    text, (start, end) = found.string, found.span()
    return " " if text[max(start - 1, 0) : start].strip() and text[end : end + 1].strip() else ""
