"""One writer per run folder, and files that are old or new but never half."""

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale import files
from scale.errors import EXIT_USAGE, ScaleError, UsageError
from scale.files import from_json, to_json, write_atomic
from scale.monitor.run_folder import RunFolder, new_name

HOLD = """
import sys
from scale.monitor.run_folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def _hold(path: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_paths(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "a"))
    found = [run.config, run.run_state, run.metrics, run.checkpoints, run.plots, run.profile]
    names = ["config.yaml", "run_state.json", "metrics.jsonl", "checkpoints", "plots", "profile"]
    assert found == [tmp_path / "a" / name for name in names]


def test_a_second_process_is_told_who_has_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "mine"
    process = _hold(path)
    try:
        with pytest.raises(UsageError) as caught, RunFolder(path).lock():
            pass
        assert str(path) in str(caught.value) and str(process.pid) in str(caught.value)
        assert "\n" not in str(caught.value) and caught.value.exit_code == EXIT_USAGE
        with RunFolder(tmp_path / "runs" / "other").lock():
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with RunFolder(path).lock():  # a dead owner holds nothing
            assert (path / ".lock").read_text() == str(os.getpid())
    finally:
        process.kill()
        process.wait()
    with RunFolder(path).lock():
        pass


def test_a_second_lock_in_the_same_process_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    with RunFolder(path).lock():
        for other in (path, tmp_path / "link", "run"):
            with pytest.raises(UsageError, match=f"process {os.getpid()} is working in this run folder"):
                RunFolder(other).lock().__enter__()
        # had one of them opened and closed the file, the lock would be gone for other processes
        done = subprocess.run([sys.executable, "-c", HOLD, str(path)], input="", capture_output=True, text=True)
        assert done.returncode == 1 and f"process {os.getpid()} is working" in done.stderr
    with RunFolder(path).lock():
        pass


def test_a_refused_lock_does_not_bar_this_process_later(tmp_path: Path) -> None:
    process = _hold(tmp_path)
    try:
        with pytest.raises(UsageError, match=f"process {process.pid}"), RunFolder(tmp_path).lock():
            pass
    finally:
        process.kill()
        process.wait()
    with RunFolder(tmp_path).lock():
        pass


def _try(path: Path) -> None:
    with RunFolder(path).lock():
        pass


def test_a_forked_child_holds_nothing_of_its_parent(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    go = context.Event()
    with RunFolder(tmp_path).lock():
        child = context.Process(target=lambda: (go.wait(30), _try(tmp_path)))
        child.start()
    go.set()  # the parent is done, and the child knows nothing of it
    child.join(30)
    assert child.exitcode == 0


def test_the_lock_ends_with_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunFolder(tmp_path).lock():
        raise KeyError
    with RunFolder(tmp_path).lock():
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ScaleError, match="no run can be written here"), RunFolder(tmp_path / "file" / "run").lock():
        pass


def test_new_name() -> None:
    assert re.fullmatch(r"demo_20\d{6}_\d{6}", new_name("demo"))


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("one\r\nção", "", "two"):
        write_atomic(path, text)
        assert path.read_bytes() == text.encode() and [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_write_atomic_fails_in_one_line_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, "old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, where, full)
    with pytest.raises(ScaleError, match=r"x\.json: cannot be written: No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def _write_for_ever(path: Path) -> None:
    for n in range(10**9):
        write_atomic(path, str(n % 10) * 200_000)


def test_write_atomic_is_whole_when_killed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    context = multiprocessing.get_context("fork")
    for _ in range(10):
        process = context.Process(target=_write_for_ever, args=(path,))
        process.start()
        process.join(0.03)
        process.kill()
        process.join()
        if path.exists():
            text = path.read_text()
            assert len(text) == 200_000 and len(set(text)) == 1
    write_atomic(path, "last")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@given(st.recursive(st.floats() | st.text() | st.integers() | st.none() | st.booleans(), st.lists, max_leaves=20))
def test_strict_json_gives_every_number_back(value: object) -> None:
    text = to_json({"x": value, "pair": (value, math.nan)})
    strict = json.loads(text, parse_constant=pytest.fail)  # as other languages read it
    assert isinstance(strict, dict)
    back = from_json(text)
    assert repr(back["x"]) == repr(value) and math.isnan(back["pair"][1])


def test_states_with_nan_of_older_checkpoints_are_read() -> None:
    assert math.isnan(from_json('{"x": NaN}')["x"]) and from_json("[-Infinity]") == [-math.inf]
