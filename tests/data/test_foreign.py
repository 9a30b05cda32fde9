"""What people put in the place of text and rows: read if it can be, else named in one line with what to do."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.data.recognise import foreign
from scale.data.tools import clean, source_from, validate
from tests.data.test_sources import error_of, texts

ROWS = [{"text": f"döc {i}, \u4e2d"} for i in range(300)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
WANT = [row["text"] for row in ROWS]


def zstd(content):
    sink = io.BytesIO()
    with pa.CompressedOutputStream(pa.PythonFile(sink, "w"), "zstd") as file:
        file.write(content)
        file.flush()
        sink.close = lambda: None
    return sink.getvalue()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_is_read(tmp_path, suffix):
    pack, path = COMPRESS[suffix], tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(LINES[:1000]) + pack(LINES[1000:]))  # two members, as `cat` joins them
    assert texts(kind="jsonl", path=str(path)) == WANT
    assert source_from(str(path)).kind == "jsonl"
    assert texts(kind="jsonl", path=str(tmp_path)) == WANT
    path.rename(tmp_path / "wrong-name.jsonl")
    assert texts(kind="jsonl", path=str(tmp_path)) == WANT
    text = tmp_path / f"b.txt{suffix}"
    text.write_bytes(pack("eins\n\nzwei é".encode()))
    assert source_from(str(text)).kind == "text"
    assert texts(kind="text", path=str(text)) == ["eins\n\nzwei é"]
    assert texts(kind="text", path=str(text), split="paragraph") == ["eins", "zwei é"]
    table = tmp_path / f"c.csv{suffix}"
    table.write_bytes(pack(b'text\r\n"a\r\nb"\r\n'))
    assert texts(kind="csv", path=str(table)) == ["a\r\nb"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_cut_and_damaged_archives_are_named(tmp_path, suffix):
    whole, path = COMPRESS[suffix](LINES), tmp_path / f"a.jsonl{suffix}"
    for cut in (len(whole) - 1, len(whole) // 2, 20):
        path.write_bytes(whole[:cut])
        assert "is cut off; fetch it again" in error_of(kind="jsonl", path=str(path))
    path.write_bytes(whole[: len(whole) // 2] + b"\xff" * 40 + whole[len(whole) // 2 + 40 :])
    message = error_of(kind="jsonl", path=str(path))
    assert message.startswith(str(path)) and ("damaged" in message or "cut off" in message or "UTF-8" in message)
    path.write_bytes(LINES)
    assert f"is named {suffix}, but its content is not" in error_of(kind="jsonl", path=str(path))
    result = clean_of(tmp_path, path, whole[: len(whole) // 2])
    assert result.read == result.kept + result.dropped.total()
    assert result.dropped["files that cannot be read (on)"] == 1


def clean_of(folder, path, content):
    path.write_bytes(content)
    (folder / "in").mkdir()
    (folder / "in" / "whole.jsonl").write_bytes(b'{"text": "whole"}\n')
    path.rename(folder / "in" / path.name)
    return clean(source_from(str(folder / "in"), kind="jsonl"), folder / "out.jsonl")


def tar(content):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as file:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(content)
        file.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def zip_(content):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        file.writestr("a.jsonl", content)
    return sink.getvalue()


def parquet(_):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def array(_):
    sink = io.BytesIO()
    np.save(sink, np.zeros((3, 3)))
    return sink.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = b"\n<!DOCTYPE html>\n<html><body>404</body></html>\n"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
ANYWHERE = {
    "zip": (zip_(LINES), "a zip archive; unpack it first"),
    "tar": (tar(LINES), "a tar archive; unpack it first"),
    "tar.gz": (gzip.compress(tar(LINES)), "inside gzip is a tar archive"),
    "gzip twice": (gzip.compress(gzip.compress(LINES)), "inside gzip is a gzip file"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
    "parquet": (parquet(LINES), "a Parquet file; read it with kind: parquet"),
    "numpy": (array(LINES), "a NumPy array"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\n", "a PDF"),
    "png": (PNG, "an image (PNG)"),
    "jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "an image (JPEG)"),
    "git lfs": (LFS, "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    "UTF-16 with mark": ("\ufeff".encode("utf-16-le") + LINES.decode().encode("utf-16-le"), "UTF-16 text"),
    "UTF-16BE with mark": ("\ufeff".encode("utf-16-be") + LINES.decode().encode("utf-16-be"), "UTF-16 text"),
    "UTF-16LE": (LINES.decode().encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
    "UTF-16BE": (LINES.decode().encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
    "UTF-32 with mark": (LINES.decode().encode("utf-32"), "UTF-32 text"),
    "UTF-32LE": (LINES.decode().encode("utf-32-le"), "iconv -f UTF-32LE -t UTF-8"),
    "UTF-32BE": (LINES.decode().encode("utf-32-be"), "iconv -f UTF-32BE -t UTF-8"),
    "Latin-1": ('{"text": "déjà"}\n'.encode("latin-1"), "not UTF-8: byte 0xe9 at byte 11"),
    "NUL bytes": (b'{"text": "a\0b"}\n', "a NUL byte at byte 11"),
}
ROWS_ONLY = {"html": (HTML, "an HTML page"), "xml": (b"<?xml version='1.0'?><a/>", "an XML file")}


@pytest.mark.parametrize("name", [*ANYWHERE, *ROWS_ONLY])
@pytest.mark.parametrize("kind", ["jsonl", "text", "csv"])
def test_something_else(tmp_path, name, kind):
    content, said = (ANYWHERE | ROWS_ONLY)[name]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)
    if kind == "text" and name in ROWS_ONLY:
        assert texts(kind=kind, path=str(path)) == [content.decode()]
        return
    message = error_of(kind=kind, path=str(path))
    assert said in message and message.startswith(str(path))
    assert not validate(source_from(str(path), kind=kind)).ok


JSONL = {
    "array": (
        json.dumps(ROWS, indent=1).encode(),
        "is a JSON array, expected one object per line; convert it: jq -c '.[]'",
    ),
    "array on one line": (json.dumps(ROWS).encode(), "is a JSON array"),
    "array after a mark": (b"\xef\xbb\xbf [\n{}]", "is a JSON array"),
    "array in a line": (b'{"text": "a"}\n[{"text": "b"}]\n', "expected a JSON object {...}, found '[{"),
    "pretty-printed object": (
        json.dumps(ROWS[0], indent=1).encode(),
        ":1: the JSON object is cut off (it must stand on one",
    ),
    "comma after each": (b'{"text": "a"},\n{"text": "b"}\n', ":1: not JSON: a comma after the object"),
    "two on a line": (b'{"text": "a"}{"text": "b"}\n', ":1: not JSON: more after the object, at column 14"),
    "old line ends": (b'{"text": "a"}\r{"text": "b"}\r', "lines end with \\r alone"),
    "key twice": (b'{"text": "a", "text": "b"}\n', ":1: key 'text' is given twice"),
    "unused key twice": (b'{"text": "a"}\n{"text": "a", "n": 1, "n": 2}\n', ":2: key 'n' is given twice"),
    "nested key twice": (b'{"text": "a", "m": [{"x": 1, "x": 1}]}\n', ":1: key 'x' is given twice"),
}


@pytest.mark.parametrize("name", JSONL)
def test_what_is_not_quite_jsonl(tmp_path, name):
    content, said = JSONL[name]
    (tmp_path / "a.jsonl").write_bytes(content)
    assert said in error_of(kind="jsonl", path=str(tmp_path / "a.jsonl"))


def test_line_ends_and_a_last_line_without_one(tmp_path):
    for end in (b"\n", b"\r\n"):
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}' + end + end + b'{"text": "b"}')
        assert texts(kind="jsonl", path=str(tmp_path / "a.jsonl")) == ["a", "b"]
    for end in (b"\n", b"\r\n", b"\r"):
        (tmp_path / "a.txt").write_bytes(b"a" + end + b"b" + end + end + b"c")
        assert texts(kind="text", path=str(tmp_path / "a.txt"), split="line") == ["a", "b", "c"]
        assert texts(kind="text", path=str(tmp_path / "a.txt"), split="paragraph") == ["a\nb", "c"]


def test_a_very_long_line(tmp_path):
    long = "word " * 400_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": long}))
    (tmp_path / "a.csv").write_text(f"text\n{long}\n")
    assert (
        texts(kind="jsonl", path=str(tmp_path / "a.jsonl")) == texts(kind="csv", path=str(tmp_path / "a.csv")) == [long]
    )


@pytest.mark.parametrize(("content", "found"), [
    (LINES, "another kind of file"), (b"", "it is empty"), (LFS, "a Git LFS pointer"), (gzip.compress(LINES), "a gzip file"),
])  # fmt: skip
def test_not_parquet(tmp_path, content, found):
    (tmp_path / "a.parquet").write_bytes(content)
    message = error_of(kind="parquet", path=str(tmp_path / "a.parquet"))
    assert "a.parquet: not a readable Parquet file" in message and found in message


def struct(*names):
    return pa.StructArray.from_arrays([pa.array([1]) for _ in names], names=list(names))


@pytest.mark.parametrize(("columns", "names", "said"), [
    ([pa.array(["a"]), pa.array(["b"])], ["text", "text"], "column 'text' is there 2 times"),
    ([pa.array(["a"]), pa.array([1]), pa.array([2])], ["text", "n", "n"], "column 'n' is there 2 times"),
    ([pa.array(["a"]), struct("x", "x")], ["text", "m"], "column 'm.x' is there 2 times"),
    ([pa.array(["a"]), pa.ListArray.from_arrays([0, 1], struct("y", "x", "x"))], ["text", "l"], "column 'l.x' is there 2"),
])  # fmt: skip
def test_columns_that_are_there_twice(tmp_path, columns, names, said):
    pq.write_table(pa.table(columns, names=names), tmp_path / "a.parquet")
    assert said in error_of(kind="parquet", path=str(tmp_path / "a.parquet"))
    assert said in validate(source_from(str(tmp_path / "a.parquet"))).problems[0]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=300))
def test_no_text_is_taken_for_something_else(text):
    assert foreign(text.encode()) is None
