"""Every file of a run folder and of its token cache is damaged in every way, one at a time: the run goes on as the
uninterrupted one, or what was lost is recorded, or it is refused with advice that works when it is followed.

The table: `python -m pytest -n 0 -q tests/resume/test_damage.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scale.build import build_trainer
from scale.checkpoint.saved import latest_good
from scale.cli.main import main
from scale.config import load_config
from scale.data.tokenizer import content_hash
from scale.errors import UsageError
from scale.hardware import Choice
from scale.load import load_run
from tests.conftest import metrics_of, tiny_run, write_corpus
from tests.resume.damage import DAMAGES, cut, empty, follow, remove, ways_out

STEPS, STOPPED = 8, 6


@dataclass
class Home:
    """A run stopped at step 6 of 8 with checkpoints of steps 4 and 6, the uninterrupted one, and another run with its cache."""

    folder: Path
    config: Path

    def __post_init__(self) -> None:
        torch.set_num_threads(1)

    @property
    def whole(self) -> Path:
        return self.folder / "whole" / "tiny"

    def copy(self, to: Path) -> Path:
        for name in ("runs", "cache"):
            shutil.copytree(self.folder / name, to / name)
        return to / "runs" / "tiny"


def write_config(folder: Path, documents: int, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    write_corpus(folder / "corpus.jsonl", documents=documents, seed=seed)
    content = tiny_run(folder, train={"steps": STEPS}, checkpoint={"every": 2, "keep_last": 2}, seed=seed)
    content["data"] |= {"tokenizer": {"vocab_size": 300}, "seq_len": 32}
    content["eval"] = {"every": 4, "tokens": 256}
    content["model"]["overrides"] |= {"num_hidden_layers": 1, "hidden_size": 16}
    content["batch"] = {"sequences": 4}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def train_until(config: Path, step: int) -> None:
    made = build_trainer(load_config(config))
    record, made.recorder.step = made.recorder.step, lambda *row: (record(*row), stop_at(row[0].step, step))  # type: ignore
    assert made.fit() == "stopped"


def stop_at(done: int, step: int) -> None:
    if done == step:
        os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with pytest.MonkeyPatch.context() as patch:  # timing a CPU takes longer than the steps here
        patch.setattr("scale.choices.peak_flops", lambda *_: Choice("1e10", "not measured"))
        yield make_home(tmp_path_factory)


def make_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("damage")
    config = write_config(folder, 60, 0)
    train_until(config, STOPPED)
    assert main(["train", str(config), f"runs_dir={folder / 'whole'}"]) == 0
    train_until(write_config(folder / "other", 70, 1), STOPPED)
    return Home(folder, config)


def files_of(folder: Path) -> list[str]:
    """Names that do not depend on hashes of the data."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


RUN = [
    *("config.yaml", "run_state.json", "metrics.jsonl", ".lock"),
    *(f"model/{name}" for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "files.json")),
    *(
        f"checkpoints/step_0000000{step}/{name}"
        for step in (4, 6)
        for name in ("state.json", "run.json", "manifest.json", ".metadata", "__0_0.distcp")
    ),
]
CACHE = [
    *(f"tokenizer-*/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "files.json")),
    *(
        f"jsonl-*/{name}"
        for name in ("files.json", "manifest.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
    ),
    *(f"jsonl-*/{split}-00000.{kind}.npy" for split in ("train", "valid") for kind in ("tokens", "ends")),
]


def find(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


class Case:
    """One damaged copy, and what became of it."""

    def __init__(self, home: Home, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.home, self.folder, self.capsys = home, folder, capsys
        self.run = home.copy(folder)

    def train(self, *words: str) -> tuple[int, str]:
        self.capsys.readouterr()
        places = [f"runs_dir={self.run.parent}", f"data.cache={self.folder / 'cache'}"]
        code = main(["train", str(self.home.config), *places, *words])
        return code, self.capsys.readouterr().err

    def ended(self) -> str:
        """How a run that went on ended: `equal` to the uninterrupted one, or `lost`, which an event names."""
        wanted, rows = metrics_of(self.home.whole), metrics_of(self.run)
        events = [e["text"] for e in json.loads((self.run / "run_state.json").read_text())["events"]]
        ours, theirs = (latest_good(run / "checkpoints", print) for run in (self.run, self.home.whole))
        assert ours is not None and theirs is not None and ours.step == STEPS and ours.state() == theirs.state()
        same_model(self.run, self.home.whole)
        if rows == wanted:
            return "equal"
        assert rows == wanted[-len(rows) :] and any("are lost" in text for text in events), events
        return "loss recorded"


def same_model(one: Path, other: Path) -> None:
    (a, a_words), (b, b_words) = load_run(one), load_run(other)
    said = [model.config.to_dict() | {"_name_or_path": None} for model in (a, b)]
    assert said[0] == said[1] and content_hash(a_words) == content_hash(b_words)
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def outcome(home: Home, folder: Path, capsys: pytest.CaptureFixture[str], damage: Any) -> str:
    """Damage a copy and go on; where it is refused, follow every way out that is named, each on a copy of its own."""
    case = Case(home, folder / "first", capsys)
    damage(case.folder)
    code, error = case.train()
    if code == 0:
        return case.ended()
    lines = error.splitlines()
    assert code in (1, 2) and len(lines) == 1 and lines[0].startswith("scale: error: "), error
    ways = len(ways_out(lines[0]))
    assert ways, f"no way out: {lines[0]}"
    ends = []
    for number in range(ways):
        shutil.rmtree(case.folder)
        case = Case(home, folder / "first", capsys)
        damage(case.folder)
        refused, error = case.train()
        assert refused == code
        follow(ways_out(error)[number])
        code_after, error_after = case.train()
        assert code_after == 0, error_after
        ends.append(case.ended())
    return f"refused, then {' or '.join(ends)}"


def rows_changed(change: Callable[[list[bytes]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "runs" / "tiny" / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        change(lines)
        path.write_bytes(b"".join(lines))

    return damage


def other_folder(name: str) -> Callable[[Path], None]:
    """The folder `name` of the run is removed."""
    return lambda folder: shutil.rmtree(folder / "runs" / "tiny" / name)


HOLES = {  # lines: step 0 (the evaluation before training) to step 6
    "an early line deleted": (rows_changed(lambda lines: lines.pop(2)), "refused, then loss recorded"),
    "a late line deleted": (rows_changed(lambda lines: lines.pop(5)), "refused, then loss recorded or equal"),
    "a late line garbled": (
        rows_changed(lambda lines: lines.__setitem__(6, b"garbage\n")),
        "refused, then loss recorded or equal",
    ),
    "a digit changed": (
        rows_changed(lambda lines: lines.__setitem__(5, lines[5].replace(b'"loss": ', b'"loss": 1', 1))),
        "refused, then loss recorded or equal",
    ),
    "a line twice": (rows_changed(lambda lines: lines.insert(5, lines[5])), "refused, then loss recorded or equal"),
    "a torn line after the checkpoint": (rows_changed(lambda lines: lines.append(b'{"step": 7, "lo')), "equal"),
    "garbage after the checkpoint": (rows_changed(lambda lines: lines.extend([b"x\n", b"\0\n", b"y\n"])), "equal"),
    "the newest checkpoint removed": (other_folder("checkpoints/step_00000006"), "equal"),
    "all checkpoints removed": (other_folder("checkpoints"), "equal"),
    "model/ removed": (other_folder("model"), "equal"),
}


@pytest.mark.parametrize("what", HOLES)
def test_holes(what: str, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = HOLES[what]
    assert outcome(home, tmp_path, capsys, damage) == expected


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step_00000006", "model"])
def test_a_folder_of_another_run(name: str, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def damage(folder: Path) -> None:
        ours = folder / "runs" / "tiny" / name
        shutil.rmtree(ours)
        shutil.copytree(home.folder / "other" / "runs" / "tiny" / name, ours)

    expected = {
        "checkpoints": "refused, then equal",
        "checkpoints/step_00000006": "refused, then equal",
        "model": "equal",
    }
    assert outcome(home, tmp_path, capsys, damage) == expected[name]


@pytest.mark.parametrize("config", ["removed", "cut", "emptied"])
def test_another_learning_rate_is_noticed_without_config_yaml(
    config: str, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(home, tmp_path, capsys)
    {"removed": remove, "cut": cut, "emptied": empty}[config](case.run / "config.yaml", case.run)
    code, error = case.train("optim.lr=0.5")
    assert code == 2 and "optim.lr: 0.003 -> 0.5" in error and "--allow-change optim.lr" in error
    assert case.train("optim.lr=0.5", "--allow-change", "optim.lr")[0] == 0
    assert case.train("optim.lr=0.5")[0] == 0  # the new one is the run's from now on


def test_a_moved_run_goes_on_and_a_copy_under_another_name_is_asked_for(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(home, tmp_path, capsys)
    shutil.copytree(case.run, case.run.with_name("copy"))
    code, error = case.train("name=copy")
    assert code == 2 and "name: 'tiny' -> 'copy'" in error and "--allow-change name" in error
    assert case.train("name=copy", "--allow-change", "name")[0] == 0
    assert metrics_of(case.run.with_name("copy")) == metrics_of(home.whole)
    events = json.loads((case.run.with_name("copy") / "run_state.json").read_text())["events"]
    assert any("was called tiny before" in event["text"] for event in events)
    assert case.train("name=copy")[0] == 0
    moved = case.folder / "elsewhere"
    case.run.parent.rename(moved)
    case.run = moved / "tiny"
    assert case.train()[0] == 0 and case.ended() == "equal"


def test_generate_and_export_see_a_damaged_model_folder(home: Home, tmp_path: Path) -> None:
    run = home.copy(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        kept = (run / "model" / name).read_bytes()
        shutil.copy(home.folder / "other" / "runs" / "tiny" / "model" / name, run / "model" / name)
        if (run / "model" / name).read_bytes() != kept:
            with pytest.raises(UsageError, match=rf"model/{name}: .*scale train.* writes the folder anew"):
                load_run(run)
        (run / "model" / name).write_bytes(kept)
    (run / "config.yaml").write_text("garbage")
    load_run(run)  # the checkpoint knows


def cases() -> Iterator[Any]:
    """All files; those that are checked by nothing else run in the fast tests, too."""
    for name in (*RUN, *CACHE):
        quick = name in ("config.yaml", "run_state.json", "metrics.jsonl", "jsonl-*/train-00000.tokens.npy")
        yield pytest.param(name, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", cases())
def test_damage(name: str, how: str, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sub = "cache" if name in CACHE else "runs/tiny"

    def damage(folder: Path) -> None:
        DAMAGES[how](find(folder / sub, name), find(home.folder / "other" / sub, name))

    found = outcome(home, tmp_path, capsys, damage)
    with capsys.disabled():
        print(f"\n{name:45} {how:8} {found}", end="")


def test_the_list_is_complete(home: Home) -> None:
    written = files_of(home.folder / "runs" / "tiny")
    assert set(written) == set(RUN)
    kept = {find(home.folder / "cache", name) for name in CACHE}
    assert kept == {home.folder / "cache" / name for name in files_of(home.folder / "cache")} - set(
        (home.folder / "cache").rglob(".lock")
    )
