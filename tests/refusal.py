"""For the tests of bad inputs: run the real command, and see that it ends in one line and leaves nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from scale.checkpoint.saved import saved_in
from scale.cli.main import main
from scale.config import load_config
from scale.data.documents import MANIFEST, TokenStore
from scale.data.tokenizer import load as load_tokenizer
from scale.monitor.records import read_rows
from tests.conftest import tiny_run, write_corpus

REMOVED = object()
"""As the value of a change: the key goes."""
NOTICE = "damaged checkpoint passed over: "
"""The one kind of line that may stand before the error."""


class Home:
    """A corpus, its token cache, a finished run of two checkpoints and its export; tests read them and write elsewhere."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_corpus(folder / "corpus.jsonl", documents=60)
        self.run, self.export = folder / "runs" / "done", folder / "export"
        path = self.write(folder, {"name": "done", "runs_dir": str(folder / "runs")})
        assert main(["train", str(path)]) == 0
        assert main(["export", str(self.run), "--out", str(self.export)]) == 0
        assert (
            main(
                [
                    "data",
                    "tokenize",
                    str(folder / "corpus.jsonl"),
                    "--out",
                    str(folder / "store"),
                    "--vocab-size",
                    "300",
                ]
            )
            == 0
        )

    def write(self, folder: Path, changes: Mapping[str, Any]) -> Path:
        """`folder`/run.yaml: two steps on the corpus, with the values of dotted keys changed."""
        content = tiny_run(self.folder, runs_dir=str(folder / "runs"), train={"steps": 2}, checkpoint={"every": 1})
        content["data"]["tokenizer"]["vocab_size"] = 300
        for key, value in changes.items():
            *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
            at: Any = content
            for part in parents:
                at = at[part] if isinstance(at, list) else at.setdefault(part, {})
            if value is REMOVED:
                del at[last]
            else:
                at[last] = value
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return path


class Refuse:
    """Call with the words of a command line: checks what every refusal must be, and returns its line.

    `code` is the exit code, `fragments` stand in the line in this order, `run` is the folder of a run that had begun.
    """

    def __init__(self, home: Home, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.home, self.folder, self.capsys = home, folder, capsys

    def __call__(self, *words: object, code: int = 2, fragments: Sequence[str] = (), run: Path | None = None) -> str:
        before = self._files()
        self.capsys.readouterr()
        try:
            got = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            got = stop.code  # type: ignore[assignment]
        line = one_line(self.capsys.readouterr().err, fragments)
        assert got == code
        self._nothing_left(before, run)
        return line

    def _files(self) -> dict[Path, bytes]:
        roots = (self.home.folder, self.folder)
        return {p: p.read_bytes() for root in roots for p in root.rglob("*") if p.is_file()}

    def _nothing_left(self, before: dict[Path, bytes], run: Path | None) -> None:
        after = self._files()
        assert not [
            path for path in after if path.name.endswith(".tmp") or any(s.startswith(".tmp-") for s in path.parts)
        ]
        assert before.keys() <= after.keys()
        touched = {path for path, content in after.items() if before.get(path) != content}
        for path in touched:
            if run is not None and path.is_relative_to(run):
                continue
            cache = next((p for p in path.parents if p.name == "cache"), None)
            assert cache is not None, f"{path} was left behind"
            if path != cache / ".lock":  # the cache's standing lock
                whole_entry(cache / path.relative_to(cache).parts[0])
        if run is not None:
            whole_run(run)


def one_line(stderr: str, fragments: Sequence[str]) -> str:
    """The only line of an error output, which says what `fragments` say."""
    lines = [line for line in stderr.splitlines() if not line.startswith(NOTICE)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("scale: error: ")
    at = 0
    for fragment in fragments:
        at = lines[0].find(fragment, at)
        assert at >= 0, f"{fragment!r} is missing (or out of order) in: {lines[0]}"
        at += len(fragment)
    return lines[0]


def whole_entry(folder: Path) -> None:
    """A cache entry that the next run can use: a token store or a tokenizer."""
    if (folder / MANIFEST).exists():
        assert TokenStore(folder, "train").tokens
    else:
        assert len(load_tokenizer(str(folder)))


def whole_run(folder: Path) -> None:
    """All that lies in a run that had begun can be read."""
    assert status(folder) != "completed"  # "failed", unless the disk had no room even for that
    load_config(folder / "config.yaml")
    read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else None
    load_tokenizer(str(folder / "model"))


def status(run: Path) -> str:
    """What a run says of itself."""
    text: str = json.loads((run / "run_state.json").read_text())["status"]
    return text


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints of a run, all of which verify; nothing else lies beside them."""
    found = saved_in(folder / "checkpoints")
    for saved in found:
        saved.verify()
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {saved.path.name for saved in found}
    return [saved.step for saved in found]


def in_a_process(*words: object) -> subprocess.CompletedProcess[str]:
    """The installed command."""
    command = [str(Path(sys.executable).with_name("scale")), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
