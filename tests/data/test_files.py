"""Which files are read: links, hidden, empty and other files; nothing is left out without a word."""

import json
from pathlib import Path

import pytest

from scale.cli.main import main
from scale.data.files import FOLDERS, find_files, look_for
from scale.data.prepare import tokenize
from scale.data.tools import clean, inspect, source_from, split, validate
from scale.errors import UsageError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/a.jsonl", "data/deep/b.jsonl", "elsewhere/c.jsonl", "elsewhere/in/d.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(9)))
    return tmp_path


def names(path, *endings):
    return [file.as_posix() for file in find_files(path, *endings)]


def test_links_to_files_and_folders_are_followed(here):
    Path("data/linked").symlink_to("../elsewhere")
    Path("data/z.jsonl").symlink_to("../elsewhere/c.jsonl")
    Path("start").symlink_to("data")
    want = ["a.jsonl", "deep/b.jsonl", "linked/c.jsonl", "linked/in/d.jsonl"]  # c.jsonl once, by the first name
    assert names("data", ".jsonl") == [f"data/{name}" for name in want]
    assert names("start", ".jsonl") == [f"start/{name}" for name in want]
    assert look_for("data", ".jsonl").left_out == {"files that another name leads to as well": 1}
    assert len(names("data/**/*.jsonl")) == 4


def test_cycles_end(here):
    Path("data/up").symlink_to("../data")
    Path("data/deep/round").symlink_to("..")
    assert names("data", ".jsonl") == ["data/a.jsonl", "data/deep/b.jsonl"]
    assert names("data/**/*.jsonl") == ["data/a.jsonl", "data/deep/b.jsonl"]
    Path("loop").symlink_to("loop")
    with pytest.raises(UsageError, match="loop"):
        find_files("loop")


@pytest.mark.parametrize("path", ["data", "data/*.jsonl", "data/gone.jsonl"])
def test_a_link_that_leads_nowhere_is_named(here, path):
    Path("data/gone.jsonl").symlink_to("nowhere/x.jsonl")
    with pytest.raises(UsageError, match=r"data/gone\.jsonl: is a link to nowhere/x\.jsonl, which is not there"):
        find_files(path)


def test_what_is_left_out_is_counted(here):
    for name in ("data/.hidden.jsonl", "data/x.csv", "data/y.CSV", "data/README", "data/A.JSONL"):
        Path(name).write_text(Path("data/a.jsonl").read_text())
    Path("data/.git").mkdir()
    Path("data/empty.jsonl").write_text("")
    found = look_for("data", ".jsonl")
    assert [file.name for file in found.files] == ["A.JSONL", "a.jsonl", "b.jsonl"]
    want = {"hidden files or folders": 2, "files (.csv)": 2, "files (without an ending)": 1, "empty files": 1}
    assert found.left_out == want
    assert look_for("data/*").left_out == {FOLDERS: 1, "empty files": 1}
    with pytest.raises(UsageError, match=r"the folder holds no \.parquet files; left out: .*2 files \(\.csv\)"):
        find_files("data", ".parquet")


def test_every_command_says_what_it_did_not_read(here, capsys):
    Path("data/x.csv").write_text("text\nx\n")
    source, want = source_from("data", kind="jsonl"), {"files (.csv)": 1}
    assert validate(source).left_out == inspect(source).left_out == want
    assert clean(source, "clean.jsonl").left_out == split(source, "parts").left_out == want
    out = []
    for words in ("validate data", "inspect data", "clean data --out c.jsonl", "split data --out p"):
        assert main(["data", *words.split(), "--kind", "jsonl"]) == 0
        out.append(capsys.readouterr().out)
    assert main(["data", "tokenize", "data", "--kind", "jsonl", "--vocab-size", "300", "--out", "store"]) == 0
    assert main(["data", "inspect", "store"]) == 0
    out.append(capsys.readouterr().out)
    assert all("files (.csv)" in text for text in out)


def saved(model, folder, **options):
    """A tokenizer of words between spaces, with another start than end so that neither is what is unknown."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", **options)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def test_what_the_tokenizer_does_not_know_is_counted(here):
    from tokenizers import models

    Path("t.jsonl").write_text('{"text": "ab ba zebra"}\n{"text": "a b \\u4e2d\\u6587"}\n')
    words = models.WordLevel({"ab": 0, "ba": 1, "a": 2, "b": 3, "<end>": 4, "[UNK]": 5}, unk_token="[UNK]")
    pairs = models.BPE({"a": 0, "b": 1, "ab": 2, "<end>": 3, "e": 4}, [("a", "b")])
    for name, model, unknown in (("words", words, 2), ("pairs", pairs, 4)):  # zebra, and the two signs; z r, and these
        tokenizer = saved(model, name)
        manifest = tokenize(source_from("t.jsonl"), f"store-{name}", tokenizer, 0.0, progress=False)
        assert manifest.dropped["words or characters that the tokenizer does not know"] == unknown, name


def test_the_store_counts_what_it_dropped(here):
    from scale.data import tokenizer

    Path("data/a.jsonl").write_text('{"text": "one two"}\n{"text": "one two"}\n{"text": " "}\n{"text": "three"}\n')
    manifest = tokenize(source_from("data/a.jsonl"), "s", tokenizer.train(["one two three"], 270), 0.0, progress=False)
    assert {k: n for k, n in manifest.dropped.items() if n} == {"exact duplicates": 1, "empty": 1}
