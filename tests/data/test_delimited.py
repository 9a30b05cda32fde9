"""CSV and TSV: quoting, line ends inside fields, marks, headers, and what is wrong with a file."""

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.data.tools import clean, inspect, source_from, validate
from tests.data.test_sources import error_of, texts


def test_quotes_line_ends_marks_and_delimiters(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfid,text\r\n1,"a, ""b""\r\n\r\nc"\r\n\r\n2,d')
    assert texts(kind="csv", path=str(path)) == ['a, "b"\r\n\r\nc', "d"]
    assert texts(kind="csv", path=str(path), columns={"text": "{id}: {text}"})[1] == "2: d"
    (tmp_path / "a.tsv").write_text('id\ttext\n1\ta, b\n2\t"x\ty"\n')
    assert texts(kind="csv", path=str(tmp_path / "a.tsv")) == ["a, b", "x\ty"]
    (tmp_path / "b.csv").write_text("id;text\n1;a, b\n")
    assert texts(kind="csv", path=str(tmp_path / "b.csv"), delimiter=";") == ["a, b"]
    assert "no column 'text'; there are: id;text" in error_of(kind="csv", path=str(tmp_path / "b.csv"))
    assert source_from(str(path)).kind == source_from(str(tmp_path / "a.tsv")).kind == "csv"


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1))
def test_what_the_csv_module_writes_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["n", "text"], *([str(i), row] for i, row in enumerate(rows))])
    assert texts(kind="csv", path=str(path)) == rows


@pytest.mark.parametrize(("content", "said"), [
    (b"id,text,text\n1,a,b\n", "a.csv:1: the header names column 'text' 2 times"),
    (b"id,text,id\n1,a,b\n", "a.csv:1: the header names column 'id' 2 times"),
    (b"id,body\n1,a\n", "a.csv: no column 'text'; there are: id, body"),
    (b"id,text\n1,a\n2,b,c\n", "a.csv:3: 3 fields, but the header has 2"),
    (b"id,text\n1\n", "a.csv:2: 1 fields, but the header has 2"),
    (b'id,text\n1,"a\nb\n', "a.csv:2: not valid CSV (unexpected end of data)"),
    (b'id,text\n1,"a" b\n', "a.csv:2: not valid CSV (',' expected after '\"')"),
    (b"id,text\r1,a\r2,b\r", "a.csv:1: not valid CSV (lines end with \\r alone)"),
    (b"id,text\n1,\xe9\n", "a.csv:2: not UTF-8"),
    (b"id,text\n", "a.csv: holds no documents"),
    (b"", "a.csv: holds no documents"),
])  # fmt: skip
def test_broken_files(tmp_path, content, said):
    (tmp_path / "a.csv").write_bytes(content)
    assert said in error_of(kind="csv", path=str(tmp_path / "a.csv"))
    if content and b"body" not in content:
        assert not validate(source_from(str(tmp_path / "a.csv"))).ok


def test_tools_go_on_after_a_broken_record(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,a\n2,b,c\n3,d\n")
    source = source_from(str(path), columns={"text": "text"})
    assert validate(source).counts["invalid"] == 1 and inspect(source).facts["unreadable rows"] == 1
    result = clean(source, tmp_path / "c.jsonl")
    assert (result.read, result.kept, result.dropped) == (3, 2, {"unreadable": 1})
