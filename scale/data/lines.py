"""Lines of UTF-8 text files, and documents made of them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from scale.data.columns import RawDocument
from scale.data.compressed import opened
from scale.errors import UsageError


def byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line with its end) of a text file, decompressed; a byte order mark is skipped."""
    with opened(path) as file:
        for n, raw in enumerate(file, start=1):
            yield n, raw.removeprefix(codecs.BOM_UTF8) if n == 1 else raw


def head(path: Path) -> bytes:
    """Some hundred of the first bytes of a text file, decompressed."""
    with opened(path) as file:
        start: bytes = file.peek(4096)  # type: ignore[attr-defined]
        return start


def decode(raw: bytes, where: str) -> str:
    """UTF-8 text without NUL bytes, or UsageError."""
    if b"\0" in raw:
        raise UsageError(f"{where}: binary data (a NUL byte at byte {raw.index(0)} of the line), expected UTF-8 text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start} of the line; convert the file to UTF-8 "
            "(from Latin-1: iconv -f latin1 -t utf-8)"
        ) from None


def whole_file(path: Path) -> RawDocument:
    """The file as one document, every character of it but the byte order mark."""
    return RawDocument(str(path), text="".join(decode(raw, f"{path}:{n}") for n, raw in byte_lines(path)))


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("path:line", line without its end), whether lines end with \\n, \\r\\n or \\r alone."""
    for n, raw in byte_lines(path):
        line = decode(raw, f"{path}:{n}").rstrip("\r\n")
        yield from ((f"{path}:{n}", part) for part in line.split("\r"))


def paragraphs(path: Path) -> Iterator[RawDocument]:
    """Runs of lines between blank lines."""
    where, lines = "", list[str]()
    for here, line in text_lines(path):
        if line.strip():
            where = where if lines else here
            lines.append(line)
        elif lines:
            yield RawDocument(where, text="\n".join(lines))
            lines = []
    if lines:
        yield RawDocument(where, text="\n".join(lines))
