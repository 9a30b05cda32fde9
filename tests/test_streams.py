"""Standard output that is closed or full: a run goes on and says so once, other verbs end as any program in a pipe does."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scale.errors import ScaleError, UsageError, one_line
from scale.streams import guarded_output
from tests.conftest import metrics_of, write_corpus

SCALE = [sys.executable, "-m", "scale.cli.main"]


class Broken:
    """A stream that fails in this way."""

    def __init__(self, number: int):
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    flush = write  # type: ignore[assignment]

    def fileno(self) -> int:
        raise OSError(errno.EBADF, "none")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_what_goes_on_says_once_that_it_is_not_seen(number, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Broken(number))
    with guarded_output(goes_on=True):
        print("one")
        print("two", flush=True)
    assert capsys.readouterr().err == f"scale: standard output: {os.strerror(number)}: the run goes on unseen\n"


def test_what_lives_for_its_output_ends_with_the_name_of_the_stream(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    with guarded_output(), pytest.raises(OSError, match="standard output"):
        print("one")


def test_nothing_fails_without_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(errno.EPIPE))
    monkeypatch.setattr(sys, "stderr", Broken(errno.EPIPE))
    with guarded_output(goes_on=True):
        print("one")
        print("two", file=sys.stderr, flush=True)


@pytest.mark.parametrize("close", ["stdout", "both"])
def test_a_run_whose_reader_has_gone(close, make_config: Callable[..., Path], tmp_path: Path) -> None:
    """`scale train ... | head -1`, and `2>&1 | head -1`."""
    config = make_config()
    err = subprocess.STDOUT if close == "both" else subprocess.PIPE
    process = subprocess.Popen(
        [*SCALE, "train", str(config), "monitor.progress=true"], stdout=subprocess.PIPE, stderr=err
    )
    assert process.stdout is not None and process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().decode() if process.stderr is not None else ""
    assert process.wait(200) == 0, said
    if close == "stdout":
        assert said.count("the run goes on unseen") == 1 and len(said.splitlines()) == 1, said
    run = tmp_path / "runs" / "tiny"
    state = json.loads((run / "run_state.json").read_text())
    assert (state["status"], state["error_message"], len(metrics_of(run))) == ("completed", None, 21)


def test_a_process_without_standard_streams_writes_into_no_file(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    """A file opened by it would else be standard output."""
    words = " ".join([*SCALE, "train", str(make_config()), "monitor.progress=true"])
    assert subprocess.run(["bash", "-c", f"exec {words} <&- >&- 2>&-"], timeout=200).returncode == 0
    assert len(metrics_of(tmp_path / "runs" / "tiny")) == 21


def test_other_verbs(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    words = [*SCALE, "data", "inspect", str(corpus)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr == "scale: error: standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SystemExit(1), "SystemExit: 1"),
        (KeyError("loss"), "KeyError: 'loss'"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("two\nlines"), "RuntimeError: two lines"),
        (UsageError("steps = 0"), "steps = 0"),
        (ScaleError(), "ScaleError"),
    ],
)
def test_an_error_in_one_line_is_never_a_bare_word(error, line):
    assert one_line(error) == line
