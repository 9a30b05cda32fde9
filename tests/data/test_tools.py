"""validate, clean, split, inspect and their commands."""

import argparse
import json
import os
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.cli.data import add_commands
from scale.data import sources, tokenizer
from scale.data.normalise import normalised
from scale.data.prepare import tokenize
from scale.data.tools import clean, inspect, source_from, split, validate
from scale.errors import MissingExtra, UsageError

FARENSE = Path(__file__).parents[3] / "shared" / "data" / "farense" / "train.jsonl"
QA = [
    {"prompt": "Who?", "completion": "Me.", "metadata": {"kind": "a"}},
    {"prompt": "Who?", "completion": "You.", "metadata": {"kind": "b"}},
    {"prompt": "Who?", "completion": "Me.", "metadata": {"kind": "c"}},
    {"prompt": "Why?", "completion": " "},
]


def jsonl(path: Path, *rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def run(*arguments):
    parser = argparse.ArgumentParser(prog="scale data")
    add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(list(arguments))
    return args.run(args)


def test_validate_counts_question_answer_rows(tmp_path):
    result = validate(source_from(jsonl(tmp_path / "a.jsonl", *QA)))
    assert result.ok
    assert result.counts == {"rows": 4, "invalid": 0, "empty": 1, "duplicates": 1, "repeated prompts": 2}


def test_validate_names_every_broken_line(tmp_path):
    path = tmp_path / "a.jsonl"
    jsonl(path, QA[0], {"prompt": "x", "completion": 5}, {"prompt": "x"}, QA[0] | {"metadata": []})
    with path.open("ab") as file:
        file.write(b'{"prompt": "\xff"}\n{"prompt": "cut\n')
    result = validate(source_from(str(path)))
    assert result.counts["rows"] == 6 and result.counts["invalid"] == 5 and not result.ok
    for n, message in [
        (2, "column 'completion' is not text"),
        (3, "no column 'completion'"),
        (4, "column 'metadata' is not an object"),
        (5, "not UTF-8"),
        (6, "the JSON object is cut off"),
    ]:
        assert any(f"a.jsonl:{n}: {message}" in p for p in result.problems)


def test_validate_other_kinds(tmp_path):
    pq.write_table(pa.table({"text": ["a", "a", ""]}), tmp_path / "a.parquet")
    assert validate(source_from(str(tmp_path / "a.parquet"))).counts == {
        "rows": 3,
        "invalid": 0,
        "empty": 1,
        "duplicates": 1,
    }
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "bad.txt").write_bytes(b"\0")
    result = validate(source_from(f"{tmp_path}/*.txt"))
    assert result.counts["invalid"] == 1 and "bad.txt:1: binary data" in result.problems[0]
    masked = jsonl(tmp_path / "m.jsonl", {"input_ids": [1, 2], "labels": [-100, -100]})
    assert validate(source_from(masked)).counts["nothing to learn"] == 1
    (tmp_path / "none.jsonl").write_text("")
    assert validate(source_from(str(tmp_path / "none.jsonl"))).problems[0].endswith("holds no rows (the data is empty)")


def test_validate_finds_a_changed_byte_in_a_store(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"document {i}"} for i in range(20)))
    tokenize(source_from(path), tmp_path / "s", tokenizer.train(["document"], 270), 0.1, progress=False)
    assert validate(source_from(str(tmp_path / "s"))).ok
    file = tmp_path / "s" / "train-00000.tokens.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (problem,) = validate(source_from(str(tmp_path / "s"))).problems
    assert "train-00000.tokens.npy: content differs from its hash" in problem


def test_clean_normalises_and_says_what_it_dropped(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": "cafe\u0301 \x07bell\r\n", "n": 1, "deep": {"x": ["e\u0301"]}},
        {"text": "caf\u00e9 bell", "n": 2},
        {"text": " \x00"},
        {"text": "short"},
        {"text": "long " * 10},
        {"text": None},
    )
    result = clean(source_from(path), tmp_path / "out.jsonl", min_chars=6, max_chars=40)
    assert lines(tmp_path / "out.jsonl") == [{"text": "caf\u00e9 bell\n", "n": 1, "deep": {"x": ["\u00e9"]}}]
    assert (result.read, result.kept, result.changed) == (6, 1, 1)
    assert result.dropped == {
        "exact duplicates": 1,
        "empty": 1,
        "shorter than 6 characters": 1,
        "longer than 40 characters": 1,
        "unreadable": 1,
    }
    assert result.examples["exact duplicates"] == [f"{path}:2"]


def test_clean_drops_near_duplicates(tmp_path):
    base = "the rain in spain stays mainly in the plain and never on the hills of the north"
    path = jsonl(tmp_path / "a.jsonl", {"text": base}, {"text": base + " east"}, {"text": "something else altogether"})
    clean(source_from(path), tmp_path / "all.jsonl")
    assert len(lines(tmp_path / "all.jsonl")) == 3
    result = clean(source_from(path), tmp_path / "near.jsonl", near=0.8)
    assert [r["text"] for r in lines(tmp_path / "near.jsonl")] == [base, "something else altogether"]
    assert result.examples == {"near duplicates (0.8)": [f"{path}:2"]}
    with pytest.raises(UsageError, match=r"--near 80: a similarity above 0 and up to 1"):
        clean(source_from(path), tmp_path / "x.jsonl", near=80)


def test_near_without_datasketch_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(MissingExtra, match=r"scale-trainer\[dedup\]"):
        clean(source_from(path), tmp_path / "x.jsonl", near=0.8)


CONTROLS = [chr(c) for c in (*range(32), *range(127, 160))] + list("\u2028\u2029\ufeff")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("aé1中", min_size=1), min_size=1),
    st.lists(st.text(st.sampled_from(CONTROLS), min_size=1, max_size=4), min_size=1),
)
def test_words_are_never_glued(words, between):
    """Whatever control characters stand between two words, white space or a space is left."""
    text = words[0] + "".join(between[i % len(between)] + word for i, word in enumerate(words[1:]))
    changes = Counter()
    once = normalised(text, changes)
    assert once.split() == words
    assert not changes if once == text else changes.total()


def test_changes_are_counted_by_kind(tmp_path):
    texts = [
        "one\fTwo\vthree\x85four\u2028five",
        "a\r\nb\rc",
        "a\x00b \x07c\x1fd",
        "\ufeffso\u00adft\ufeffer",
        "e\u0301",
        "fine",
    ]
    path = jsonl(tmp_path / "a.jsonl", *({"text": t} for t in texts), {"text": "x", "m": {"deep": ["y\fz"]}})
    result = clean(source_from(path), tmp_path / "out.jsonl")
    got = [row["text"] for row in lines_of(tmp_path / "out.jsonl")]
    assert got == ["one\nTwo\nthree\nfour\nfive", "a\nb\nc", "a b c d", "soft er", "é", "fine", "x"]
    assert result.changes == {
        "page and other breaks (to \\n)": 5,
        "line ends (\\r\\n, \\r)": 2,
        "control characters": 2,
        "separators (to a space)": 1,
        "byte order marks": 2,
        "soft hyphens": 1,
        "texts with characters to compose (NFC)": 1,
    }
    assert (result.read, result.kept, result.changed) == (7, 7, 6)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.text(), st.integers(), st.none(), st.lists(st.text())), min_size=1), st.integers(0, 5))
def test_no_row_vanishes_while_cleaning(tmp_path_factory, values, least):
    folder = tmp_path_factory.mktemp("clean")
    rows = [{"text": value} for value in values] + [{"text": "a row that is surely good"}]
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = clean(source_from(str(path)), folder / "out.jsonl", min_chars=least)
    assert result.read == len(rows) == result.kept + result.dropped.total()
    assert len(lines_of(folder / "out.jsonl")) == result.kept


def test_values_that_json_does_not_hold(tmp_path):
    table = pa.table({"text": ["a"], "when": pa.array([0], pa.date32())})
    pq.write_table(table, tmp_path / "a.parquet")
    result = clean(source_from(str(tmp_path / "a.parquet")), tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl") == [{"text": "a", "when": "1970-01-01"}]
    assert result.changes == {"values of type date (to text)": 1}
    pq.write_table(pa.table({"text": ["a", "b"], "raw": [b"\xff", b"\xfe"]}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b\.parquet: row 0: holds bytes .*which JSON cannot hold"):
        split(source_from(str(tmp_path / "b.parquet")), tmp_path / "s")
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "x": "\\ud800"}\n{"text": "c", "\\udfff": 1}\n')
    result = clean(source_from(str(path)), tmp_path / "c-out.jsonl")
    assert result.kept == 1 and result.dropped == {"unreadable": 2}
    assert "c.jsonl:2: text holds \\ud800, half of a surrogate pair" in result.examples["unreadable"][0]


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    once = normalised(text)
    assert normalised(once) == once
    assert not [c for c in once if (ord(c) < 32 or 127 <= ord(c) < 160) and c not in "\n\t"]


def test_failed_clean_leaves_nothing_and_replaces_nothing(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(UsageError, match=r"nothing is left after cleaning 1 rows \(1 shorter than 9 characters\)"):
        clean(source_from(path), tmp_path / "out.jsonl", min_chars=9)
    with pytest.raises(UsageError, match=r"no column 'txt'; there are: text; did you mean 'text'"):
        clean(source_from(path, columns={"text": "txt"}), tmp_path / "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    (tmp_path / "out.jsonl").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    for there in ("out.jsonl", "pipe"):
        with pytest.raises(UsageError, match=rf"{there}: exists already; choose another file or delete it first"):
            clean(source_from(path), tmp_path / there)
    assert (tmp_path / "out.jsonl").read_text() == "old" and (tmp_path / "pipe").is_fifo()


def test_split_keeps_groups_together_and_loses_nothing(tmp_path):
    rows = [{"prompt": f"p{i % 60}", "completion": str(i)} for i in range(200)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    result = split(source_from(path), tmp_path / "s", fraction=0.1, by="prompt")
    train, valid = lines(tmp_path / "s" / "train.jsonl"), lines(tmp_path / "s" / "valid.jsonl")
    assert sorted(map(str, train + valid)) == sorted(map(str, rows))
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in valid}
    assert (result.train, result.valid) == (len(train), len(valid)) and 16 <= len(valid) <= 20
    assert train == [r for r in rows if r in train]  # in order
    path = jsonl(tmp_path / "b.jsonl", *rows[::-1])
    split(source_from(path), tmp_path / "t", fraction=0.1, by="prompt")
    assert {r["prompt"] for r in lines(tmp_path / "t" / "valid.jsonl")} == {r["prompt"] for r in valid}


def test_split_without_by_keeps_equal_rows_together(tmp_path):
    rows = [{"text": str(i % 50)} for i in range(100)]
    split(source_from(jsonl(tmp_path / "a.jsonl", *rows)), tmp_path / "s", fraction=0.2)
    valid = Counter(r["text"] for r in lines(tmp_path / "s" / "valid.jsonl"))
    assert len(valid) == 10 and set(valid.values()) == {2}


def test_split_divides_the_same_rows_alike_and_more_rows_move_few(tmp_path, capsys):
    rows = [{"text": f"row {i}"} for i in range(220)]
    valid = {}
    for name, some in (("a", rows[:200]), ("b", rows[199::-1]), ("more", rows)):
        split(source_from(jsonl(tmp_path / f"{name}.jsonl", *some)), tmp_path / name, fraction=0.1)
        valid[name] = {row["text"] for row in lines(tmp_path / name / "valid.jsonl")}
    assert valid["a"] == valid["b"] and (len(valid["a"]), len(valid["more"])) == (20, 22)
    old = {row["text"] for row in rows[:200]}
    assert 0 < len(valid["a"] ^ (valid["more"] & old)) <= 5
    with pytest.raises(SystemExit):
        run("split", "--help")
    assert "rows added or removed may move a few others" in " ".join(capsys.readouterr().out.split())


def test_split_errors(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "a", "g": 1}, {"text": "b", "g": 1})
    for arguments, message in [
        ({"by": "x"}, r"a\.jsonl:1: --by x: no such column; there are: text, g"),
        ({"by": "g"}, "cannot be divided: it has 1 value of column 'g'"),
        ({"fraction": 10}, "--fraction 10: the share of validation rows"),
    ]:
        with pytest.raises(UsageError, match=message):
            split(source_from(path), tmp_path / "s", **arguments)
    assert not (tmp_path / "s").exists()
    split(source_from(path), tmp_path / "s")
    with pytest.raises(UsageError, match=r"train\.jsonl: exists already"):
        split(source_from(path), tmp_path / "s")
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(
        UsageError, match=r"bad\.jsonl:1: the JSON object is cut off.*`scale data clean` drops such rows"
    ):
        split(source_from(str(tmp_path / "bad.jsonl")), tmp_path / "t")


def test_inspect_counts_lengths_and_fields(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "abc"}, {"text": "abcd", "n": 1}, {"text": 3})
    result = inspect(source_from(path), samples=2)
    assert result.facts == {"rows": 4, "unreadable rows": 1, "characters": 8}
    assert result.histogram == [(1, 1, 1), (2, 3, 1), (4, 7, 1)]
    assert result.quantiles["min"] == 1 and result.quantiles["median"] == 3 and result.quantiles["max"] == 4
    assert result.fields == {"text": {"str": 3}, "n": {"int": 1}} and result.samples == ["a", "abc"]


def test_inspect_stores_and_tokens(tmp_path):
    texts, EOS = [f"document number {i}" for i in range(30)], tokenizer.END_OF_TEXT
    path = jsonl(tmp_path / "a.jsonl", *({"text": t} for t in texts))
    tok = tokenizer.train(texts, 280)
    tok.save_pretrained(str(tmp_path / "tok"))
    tokenize(source_from(path), tmp_path / "s", tok, 0.1, progress=False)
    store = inspect(source_from(str(tmp_path / "s")), samples=2)
    assert all(s.removeprefix(EOS).removesuffix(EOS) in texts for s in store.samples) and len(store.samples) == 2
    raw = inspect(source_from(path), tokenizer=str(tmp_path / "tok"))
    assert raw.unit == "tokens"
    assert raw.facts["tokens"] == store.facts["tokens (train)"] + store.facts["tokens (valid)"]
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3]]))
    assert inspect(source_from(str(tmp_path / "a.npy"))).samples == ["[1, 2, 3]"]


def test_source_arguments(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    assert source_from("python-stdlib").kind == "python-stdlib"
    hub = source_from("hf:org/name", split="test", streaming=True, max_documents=3)
    assert (hub.kind, hub.path, hub.split, hub.max_documents) == ("huggingface", "org/name", "test", 3)
    assert source_from(str(tmp_path / "a.doc"), kind="text", split="line").split == "line"
    for arguments, message in [
        ((str(tmp_path / "a.doc"),), r"cannot tell what it is from the endings '\.doc'; give --kind"),
        ((str(tmp_path / "none.jsonl"),), "no such file or folder"),
    ]:
        with pytest.raises(UsageError, match=message):
            source_from(*arguments)
    with pytest.raises(UsageError, match="python-stdlib: split: a python-stdlib source has no such option"):
        source_from("python-stdlib", split="line")
    with pytest.raises(UsageError, match="hub: streaming needs max_documents"):
        source_from("hf:hub", streaming=True)


def test_commands_and_their_examples_work(tmp_path, monkeypatch, capsys):
    """Every example in --help runs as printed; the library is cut to a few files to be quick."""
    few = sources.stdlib_files()[:25]
    monkeypatch.setattr(sources, "stdlib_files", lambda: few)
    monkeypatch.chdir(tmp_path)
    for name in ("tokenize", "validate", "clean", "split", "inspect"):
        with pytest.raises(SystemExit) as stopped:
            run(name, "--help")
        assert stopped.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.count("example: ") == 1
        words = shlex.split(shown.split("example: ")[1])
        assert words[:3] == ["scale", "data", name]
        assert run(*words[2:]) == 0
    assert run("validate", "data/stdlib") == run("inspect", "data/stdlib") == 0
    assert len(lines("data/clean.jsonl")) > 5
    Path("bad.jsonl").write_text('{"text": 1}\n')
    assert run("validate", "bad.jsonl") == 1
    assert "bad.jsonl:1: column 'text' holds a number" in capsys.readouterr().out


def test_command_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    np.save("a.npy", np.array([[1, 2]]))
    for words, message in [
        ("tokenize a.jsonl --out o", "is text and needs a tokenizer"),
        ("tokenize a.jsonl --out o --vocab-size 9", "--vocab-size 9: at least 258"),
        (f"tokenize a.jsonl --out o --vocab-size {10**21}", f"--vocab-size {10**21}: .* at most 1048576"),
        ("tokenize a.jsonl --out o --vocab-size 300 --held-out 1", "--held-out 1: a share"),
        ("tokenize a.npy --out o", "tokenize works on text or rows, not on packed"),
        ("tokenize a.jsonl --out o --text '{a}\\n{b}'", r"no column 'a'"),
    ]:
        with pytest.raises(UsageError, match=message):
            run(*shlex.split(words))
        assert not Path("o").exists() and not list(Path().glob(".o*"))


@pytest.mark.skipif(not FARENSE.exists(), reason="needs the farense data")
def test_farense(tmp_path):
    source = source_from(str(FARENSE))
    counts = validate(source).counts
    assert (counts["rows"], counts["duplicates"], counts["repeated prompts"]) == (848, 56, 193)
    assert clean(source, tmp_path / "c.jsonl").dropped == {"exact duplicates": 56}
    result = split(source, tmp_path / "s", by="prompt")
    assert result.train + result.valid == 848 and 70 <= result.valid <= 85
    sides = [{r["prompt"] for r in lines(tmp_path / "s" / f"{s}.jsonl")} for s in ("train", "valid")]
    assert not sides[0] & sides[1]
