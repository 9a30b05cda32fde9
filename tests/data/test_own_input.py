"""No command writes over what it reads, whichever way the place is spelled."""

import json
from pathlib import Path

import pytest

from scale.cli.main import main
from scale.config.data import DataConfig
from scale.data.prepare import prepare
from scale.errors import UsageError
from scale.files import refuse_same_place
from tests.monitor.test_forecast import run_folder

ROWS = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """data/in.jsonl, links to both, and a folder that another glob reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("data/in.jsonl", "data/train.jsonl", "data/deep/b.jsonl"):
        (tmp_path / name).write_text(ROWS)
    Path("linked").symlink_to("data")
    Path("link.jsonl").symlink_to("data/in.jsonl")
    Path("hard.jsonl").hardlink_to("data/in.jsonl")
    return tmp_path


def everything(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("clean data/in.jsonl --out data/in.jsonl", "is the input itself"),
        ("clean data/in.jsonl --out data/deep/../in.jsonl", "is the input itself"),
        ("clean data/in.jsonl --out {here}/data/in.jsonl", "is the input itself"),
        ("clean data/in.jsonl --out link.jsonl", "is the input itself"),
        ("clean data/in.jsonl --out hard.jsonl", "is the input itself"),
        ("clean link.jsonl --out linked/in.jsonl", "is the input itself"),
        ("clean data/in.jsonl --out data", "holds the input"),
        ("clean data --out data/clean.jsonl", "lies in the input"),
        ("clean linked --out data/deep/clean.jsonl", "lies in the input"),
        ("clean data/*.jsonl --out data/in.jsonl", "is the input itself"),
        ("clean data/*.jsonl --out linked/in.jsonl", "is the input itself"),
        ("clean data/*.jsonl --out data/clean.jsonl", "would be read as input the next time"),
        ("clean data/**/b*.jsonl --out data/deep/b2.jsonl", "would be read as input the next time"),
        ("clean python-stdlib --out {stdlib}/clean.jsonl", "lies in the input"),
        ("split data/train.jsonl --out data", "is the input itself"),
        ("split data/train.jsonl --out linked", "is the input itself"),
        ("split data --out data/parts", "lies in the input"),
        ("split data/*.jsonl --out data", "is the input itself"),
        ("tokenize data --out data/tokens --vocab-size 300", "lies in the input"),
        ("tokenize data --out linked/tokens --vocab-size 300", "lies in the input"),
        ("tokenize data --out data --vocab-size 300", "is the input itself"),
        ("tokenize data/in.jsonl --out data --vocab-size 300", "holds the input"),
        ("tokenize data/*.jsonl --out data/in.jsonl --vocab-size 300", "is the input itself"),
    ],
)
def test_data_commands(here, capsys, words, said):
    before = everything(here)
    places = {"here": here, "stdlib": Path(json.__path__[0]).parent}
    assert main(["data", *words.format(**places).split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and line.endswith("choose another place")
    assert everything(here) == before


def test_places_beside_the_input_are_free(here):
    for words in (
        "clean data/in.jsonl --out data/clean.jsonl",
        "clean data/*.jsonl --out data/deep/clean.jsonl",
        "clean data/**/c*.jsonl --out data/deep/out.jsonl",
        "split data/in.jsonl --out data/parts",
        "tokenize data/in.jsonl --out data/tokens --vocab-size 300",
    ):
        assert main(["data", *words.split()]) == 0


def test_the_cache_is_never_read_as_text(here):
    def prepared(path):
        content = {"sources": [{"kind": "text", "path": path, "split": "line"}], "tokenizer": {"vocab_size": 270}}
        return prepare(DataConfig.model_validate(content | {"cache": "data/cache"}), progress=False)

    for path in ("data", "linked", ".", "data/**"):
        with pytest.raises(UsageError, match=r"data/cache: .*; choose another place"):
            prepared(path)
    assert prepared("data/**/*.jsonl").names == prepared("data/deep").names == ["text"]


def test_a_picture_never_replaces_the_records_of_its_run(tmp_path):
    folder = run_folder(tmp_path / "run", known=250)
    before = everything(folder)
    for place in ("metrics.jsonl", "config.yaml", "run_state.json", "checkpoints/x.png"):
        assert main(["forecast", str(folder), "--out", str(folder / place)]) == 2
    assert everything(folder) == before
    assert main(["forecast", str(folder), "--out", str(folder / "mine.png")]) == 0


def test_a_folder_of_the_same_name_elsewhere_is_another_place(tmp_path):
    (tmp_path / "a" / "data").mkdir(parents=True)
    refuse_same_place([tmp_path / "a" / "data"], tmp_path / "a" / "data2")
    refuse_same_place([tmp_path / "a" / "data"], tmp_path / "data")
    with pytest.raises(UsageError, match="holds the input"):
        refuse_same_place([tmp_path / "a" / "data"], tmp_path / "a")
