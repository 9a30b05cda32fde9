"""Raw documents of every kind of source, and the one line that every broken input earns."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from scale.config.data import Source
from scale.data.sources import describe, documents, stdlib_files
from scale.errors import UsageError


def source(**content):
    return TypeAdapter(Source).validate_python(content)


def texts(**content):
    return [d.text for d in documents(source(**content))]


def error_of(**content):
    with pytest.raises(UsageError) as caught:
        list(documents(source(**content)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def jsonl(path: Path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_stdlib_holds_library_modules_and_no_tests():
    names = [p.as_posix() for p in stdlib_files()]
    assert names == sorted(names)
    assert any(n.endswith("/json/decoder.py") for n in names)
    assert not [n for n in names if "/test/" in n or "/tests/" in n or "/idle_test/" in n or "site-packages" in n]
    assert all(f"python{sys.version_info.major}.{sys.version_info.minor}" in n for n in names)


def test_text_by_file_keeps_every_character_but_the_byte_order_mark(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"two\r\n\n x")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \xc3\xa9")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    assert texts(kind="text", path=str(tmp_path)) == ["one é", "two\r\n\n x"]
    assert texts(kind="text", path=str(tmp_path / "*.txt")) == ["one é", "two\r\n\n x"]


def test_text_by_paragraph_and_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\na\r\nb\n \n\nc\nd")
    assert texts(kind="text", path=str(path), split="paragraph") == ["a\nb", "c\nd"]
    assert texts(kind="text", path=str(path), split="line") == ["a", "b", "c", "d"]


def test_template_joins_columns_and_shows_numbers(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"a": "x", "b": 3}, {"a": "{y}", "b": 0.5})
    assert texts(kind="jsonl", path=path, columns={"text": "{a}\n{{{b}}}"}) == ["x\n{3}", "{y}\n{0.5}"]


def test_labels_become_a_mask_of_learned_tokens(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})
    (document,) = documents(source(kind="jsonl", path=path, columns={"input_ids": "input_ids", "labels": "labels"}))
    assert document.ids.tolist() == [5, 6, 7] and document.ids.dtype == np.int64
    assert document.learned.tolist() == [False, True, True]


def test_parquet_gives_the_same_documents_as_jsonl(tmp_path):
    rows = [{"text": f"döc {i}", "n": i} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    want = [r["text"] for r in rows]
    assert texts(kind="parquet", path=str(tmp_path / "a.parquet")) == want
    assert texts(kind="jsonl", path=jsonl(tmp_path / "a.jsonl", *rows)) == want


def test_hugging_face_saved_folder_split_and_limit(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "x": [1, 2, 3]})
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(str(tmp_path / "d"))
    here = {"kind": "huggingface", "path": str(tmp_path / "d")}
    assert texts(**here, max_documents=2) == ["a", "b"]
    assert texts(**here, split="test") == ["c"]
    assert "no split 'nope'; there are: train, test" in error_of(**here, split="nope")
    assert "no column 'txt'; there are: text, x; did you mean 'text'?" in error_of(**here, columns={"text": "txt"})


@pytest.mark.parametrize(
    "content", [b'{"text": "a", "text": "b"}', b'{"text": "a', '{"text": "a"}'.encode("utf-16"), b"\0"]
)
def test_broken_files_of_a_local_dataset_are_one_line(tmp_path, content):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_bytes(content)
    message = error_of(kind="huggingface", path=str(tmp_path / "d"))
    assert (
        message.startswith(f"{tmp_path / 'd'}: cannot be loaded as a Hugging Face dataset (")
        and "occurred" not in message
    )


def test_hugging_face_streams_local_files(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "d").mkdir()
    jsonl(tmp_path / "d" / "train.jsonl", *({"text": str(i)} for i in range(50)))
    got = texts(kind="huggingface", path=str(tmp_path / "d"), streaming=True, max_documents=3)
    assert got == ["0", "1", "2"]


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_missing_files(tmp_path, kind):
    assert f"{tmp_path}/none: no such file or folder" in error_of(kind=kind, path=f"{tmp_path}/none")
    assert f"{tmp_path}/*.zzz: no file matches this pattern" in error_of(kind=kind, path=f"{tmp_path}/*.zzz")
    assert "the folder holds no" in error_of(kind=kind, path=str(tmp_path))


def test_empty_data(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    assert "a.jsonl: holds no documents (the data is empty)" in error_of(kind="jsonl", path=str(tmp_path / "a.jsonl"))


BAD_LINES = {
    b'{"text": "a\xff"}': "a.jsonl:2: not UTF-8: byte 0xff at byte 11",
    b'{"text": "a\0"}': "a.jsonl:2: binary data (a NUL byte at byte 11",
    b'{"text": "abc': "a.jsonl:2: the JSON object is cut off",
    b'{"text": "abc\\r': "a.jsonl:2: the JSON object is cut off",
    b'{"text": ': "a.jsonl:2: the JSON object is cut off",
    b'{"text": abc}': "a.jsonl:2: not JSON: Expecting value at column 10",
    b"[1, 2]": "a.jsonl:2: expected a JSON object {...}, found '[1, 2]'",
    b'{"txet": "a"}': "a.jsonl:2: no column 'text'; there are: txet; did you mean 'txet'?",
    b'{"text": 5}': "a.jsonl:2: column 'text' holds a number ('5'), expected text",
    b'{"text": null}': "a.jsonl:2: column 'text' holds null, expected text",
    b'{"text": "a\\ud800"}': "a.jsonl:2: text holds \\ud800, half of a surrogate pair",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines_are_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert BAD_LINES[line] in error_of(kind="jsonl", path=str(tmp_path / "a.jsonl"))


BAD_IDS = [
    ({"ids": [1, -2], "l": [1, -2]}, "ids[1] = -2: token ids are never negative"),
    ({"ids": [1, 2], "l": [1]}, "l has 1 entries and ids 2; they must be equally long"),
    ({"ids": [1, 2], "l": [1, 3]}, "l[1] = 3, but ids[1] = 2; labels repeat the ids (unshifted) or are -100"),
    ({"ids": "12", "l": [1]}, "column 'ids' holds text ('12'), expected a list of whole numbers"),
    ({"ids": [1, "2"], "l": [1, 2]}, "column 'ids' holds text ('2') in its list"),
    ({"ids": [1, 2.5], "l": [1, 2]}, "column 'ids' holds a fraction ('2.5') in its list"),
    ({"ids": [1, [2]], "l": [1, 2]}, "column 'ids' holds a list ('[2]') in its list"),
    ({"ids": [1, None], "l": [1, 2]}, "column 'ids' holds null in its list"),
]


@pytest.mark.parametrize(("row", "message"), BAD_IDS)
def test_bad_ids_are_named(tmp_path, row, message):
    path = jsonl(tmp_path / "a.jsonl", row)
    got = error_of(kind="jsonl", path=path, columns={"input_ids": "ids", "labels": "l"})
    assert got.startswith(f"{path}:1: ") and message in got


@pytest.mark.parametrize("template", ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{a", "{{x}}"])
def test_templates_take_plain_names_only(tmp_path, template):
    path = jsonl(tmp_path / "a.jsonl", {"a": "x"})
    assert f"columns.text = {template!r}" in error_of(kind="jsonl", path=path, columns={"text": template})


def test_broken_parquet_and_text(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    assert "a.parquet: not a readable Parquet file" in error_of(kind="parquet", path=str(tmp_path / "a.parquet"))
    (tmp_path / "a.txt").write_bytes(b"fine\n\x80\n")
    for split in ("file", "line", "paragraph"):
        assert "a.txt:2: not UTF-8: byte 0x80" in error_of(kind="text", path=str(tmp_path / "a.txt"), split=split)


def test_missing_parquet_column(tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert f"{path}: no column 'bdy'; there are: body; did you mean 'body'?" in error_of(
        kind="parquet", path=path, columns={"text": "bdy"}
    )


def test_description_follows_the_files_but_not_name_or_weight(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = describe(source(kind="text", path=str(path)))
    assert describe(source(kind="text", path=str(path), name="x", weight=3)) == first
    path.write_text("other")
    assert describe(source(kind="text", path=str(path))) != first
