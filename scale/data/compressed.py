"""Opening files for reading, decompressed where their content is compressed, whatever they are called."""

from __future__ import annotations

import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from scale.data.recognise import foreign
from scale.errors import UsageError

SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_STARTS = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
}


def _arrow(path: Path, codec: str) -> BinaryIO:
    """Several streams in a row are read as one; what is cut, damaged or follows them is an OSError."""
    import pyarrow as pa

    return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), codec)))


_OPEN: dict[str, Callable[[Path], BinaryIO]] = {
    "gzip": lambda path: cast(BinaryIO, gzip.GzipFile(path)),
    "bzip2": lambda path: _arrow(path, "bz2"),
    "xz": lambda path: cast(BinaryIO, lzma.LZMAFile(path)),  # noqa: SIM115
    "zstd": lambda path: _arrow(path, "zstd"),
}


def ending(path: Path) -> str:
    """The ending of a file name in lower case, without that of its compression: ".jsonl" of "A.JSONL.gz"."""
    name = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    return name.suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of text in a file, after decompression. The first ones can be had with `peek`.

    Raises UsageError for what cannot be read, is cut off, is not what its name says, or is something else than text.
    """
    packed: str | None = None
    try:
        with ExitStack() as held:
            file: BinaryIO = held.enter_context(path.open("rb"))
            start = file.peek(16)  # type: ignore[attr-defined]
            packed = next((name for name, magic in _STARTS.items() if magic.match(start)), None)
            named = SUFFIXES.get(path.suffix.lower())
            if start and named is not None and packed != named:
                raise UsageError(f"{path}: is named {path.suffix}, but its content is {packed or f'not {named}'}")
            if packed is not None:
                file = held.enter_context(_OPEN[packed](path))
            other = foreign(file.peek(4096))  # type: ignore[attr-defined]
            if other is not None:
                raise UsageError(f"{path}: {f'inside {packed} ' if packed else ''}is {other}")
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UsageError(f"{path}: {_told(error, packed)}") from None


def _told(error: Exception, packed: str | None) -> str:
    reason = getattr(error, "strerror", None)
    if packed is None or reason:
        return f"cannot be read ({reason or error})"
    cut = isinstance(error, EOFError) or "Truncated" in str(error)
    return f"the {packed} file is {'cut off' if cut else f'damaged ({error})'}; fetch it again"
