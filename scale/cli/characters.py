"""Characters that the terminal or the locale does not have: shown as escapes, never a traceback."""

from __future__ import annotations

import io
import os
import sys


def print_everything() -> None:
    """Let stdout and stderr write what they cannot encode as escapes, such as \\xe9."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def as_utf8(word: str) -> str:
    """A word of the command line as UTF-8, where the locale made something else of its bytes."""
    return os.fsencode(word).decode("utf-8", errors="replace")


def cannot_encode(error: UnicodeEncodeError) -> str:
    """One line about a name that the locale cannot spell."""
    return f"{error.object!r}: the locale has no such characters ({error.encoding}); set PYTHONUTF8=1 or LC_ALL=C.UTF-8"
