"""Standard output and standard error that may be closed or full: a run goes on, a verb that prints its result ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

NAMES = {"stdout": "standard output", "stderr": "standard error"}


class Output:
    """A text stream whose failures (a closed pipe, a full disk, a terminal that is gone) end a program only if it lives for
    what it prints: they are raised with the stream's name, or, where it `goes_on`, said once on standard error. What is
    printed after that goes nowhere."""

    def __init__(self, stream: TextIO, name: str, goes_on: bool):
        self._stream, self._name, self.goes_on = stream, name, goes_on
        self.reader_gone = False

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        print_nowhere(self._stream)
        self._stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        if not self.goes_on:
            self.reader_gone = isinstance(error, BrokenPipeError)
            raise OSError(error.errno, error.strerror, NAMES[self._name]) from None
        if self._name == "stdout":
            print(f"scale: {NAMES['stdout']}: {error.strerror}: the run goes on unseen", file=sys.stderr, flush=True)


@contextmanager
def guarded_output(goes_on: bool = False) -> Iterator[Output]:
    """Standard output and standard error as `Output` in this block; gives the former. Standard error always goes on."""
    if isinstance(sys.stdout, Output):
        output, before = sys.stdout, sys.stdout.goes_on
        output.goes_on = before or goes_on
        try:
            yield output
        finally:
            output.goes_on = before
        return
    streams = sys.stdout, sys.stderr
    output = Output(sys.stdout, "stdout", goes_on)
    sys.stdout, sys.stderr = output, Output(sys.stderr, "stderr", True)
    try:
        yield output
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        sys.stdout, sys.stderr = streams


def print_nowhere(stream: TextIO) -> None:
    """What the stream still holds, and all that is printed to its file descriptor from here on, is dropped."""
    with suppress(OSError, ValueError):  # one of a notebook or of a test has no file descriptor
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def open_standard_streams() -> None:
    """A standard stream that the process was started without is opened on nothing: the next file to be opened would get
    its descriptor, and with it all that libraries print there."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
