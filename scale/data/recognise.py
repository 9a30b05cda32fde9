"""What a file is that was expected to be UTF-8 text and is not, told from its first bytes."""

from __future__ import annotations

import codecs

_UNPACK = "unpack it first"
_STARTS: list[tuple[bytes, str]] = [
    (b"PK\x03\x04", f"a zip archive; {_UNPACK}"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"7z\xbc\xaf\x27\x1c", f"a 7z archive; {_UNPACK}"),
    (b"Rar!\x1a\x07", f"a rar archive; {_UNPACK}"),
    (b"\x1f\x8b", f"a gzip file; {_UNPACK}"),
    (b"BZh91AY&SY", f"a bzip2 file; {_UNPACK}"),
    (b"\xfd7zXZ\0", f"an xz file; {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"a zstd file; {_UNPACK}"),
    (b"\x04\x22\x4d\x18", f"an lz4 file; {_UNPACK}"),
    (b"PAR1\x15", "a Parquet file; read it with kind: parquet"),
    (b"ARROW1\0\0", "an Arrow file; save it as Parquet, or read the folder of a saved dataset with kind: huggingface"),
    (b"\x93NUMPY", "a NumPy array; read it with kind: packed"),
    (b"\x89HDF", "an HDF5 file; save its text as JSONL"),
    (b"SQLite format 3\0", "an SQLite database; save its text as JSONL"),
    (b"%PDF-", "a PDF; take its text out first"),
    (b"\xd0\xcf\x11\xe0", "an old Office document; take its text out first"),
    (b"\x89PNG\r\n", "an image (PNG)"),
    (b"\xff\xd8\xff", "an image (JPEG)"),
    (b"GIF87a", "an image (GIF)"),
    (b"GIF89a", "an image (GIF)"),
    (b"II*\0", "an image (TIFF)"),
    (b"MM\0*", "an image (TIFF)"),
    (b"\x7fELF", "a program (ELF)"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    ),
]
_ENCODINGS = [  # longer marks first
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
]
_FEW, _MANY = 0.05, 0.3
_ENOUGH = 16
"""Bytes from which on the places of zeros say something."""


def foreign(head: bytes) -> str | None:
    """What starts with these bytes (some hundred of them), with the fix; None if it may be UTF-8 text."""
    for start, name in _STARTS:
        if head.startswith(start):
            return name
    if head[257:262] == b"ustar":
        return f"a tar archive; {_UNPACK}"
    if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"WAVE", b"AVI "):
        return f"an image or a recording ({head[8:12].decode().strip()})"
    encoding = _other_unicode(head)
    if encoding is not None:
        return f"{encoding} text, expected UTF-8; convert it: iconv -f {encoding} -t UTF-8"
    return None


def markup(head: bytes) -> str | None:
    """An HTML or XML page in the place of rows, such as the error page of a failed download."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:15].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page (of a download that failed?)"
    return "an XML file" if start.startswith((b"<?xml", b"<!doctype")) else None


def _other_unicode(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by the mark in front or by where the zeros of ASCII characters are."""
    for mark, name in _ENCODINGS:
        if head.startswith(mark):
            return name
    whole = head[: len(head) // 4 * 4]
    if len(whole) < _ENOUGH:
        return None
    a, b, c, d = (whole[i::4].count(0) * 4 / len(whole) for i in range(4))
    if min(c, d) > 1 - _FEW and a < _FEW:
        return "UTF-32LE"
    if min(a, b) > 1 - _FEW and d < _FEW:
        return "UTF-32BE"
    even, odd = (a + c) / 2, (b + d) / 2
    if odd > _MANY and even < _FEW:
        return "UTF-16LE"
    return "UTF-16BE" if even > _MANY and odd < _FEW else None
