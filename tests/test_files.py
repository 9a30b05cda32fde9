"""Files that appear whole or not at all: what a killed writer leaves goes with the next one, what a live one writes stays."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from scale.files import new_files, new_folder

WRITER = """
import os, sys, time
from pathlib import Path
from scale.files import new_files, new_folder
kind, target, child = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "child"
with new_folder(target) if kind == "folder" else new_files(target) as aside:
    if kind == "folder":
        (aside / "part").write_text("half")
    else:
        aside[0].write(b"half"); aside[0].flush()
    worker = os.fork() if child else 1
    if worker:
        print(worker, flush=True)
    time.sleep(300)
"""


@pytest.fixture
def writer():
    started = []

    def start(kind, target, child=False):
        command = [sys.executable, "-c", WRITER, kind, str(target), "child" if child else ""]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process.pid)
        worker = int(process.stdout.readline())
        if child:
            started.append(worker)
        return process, worker

    yield start
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def write(kind: str, target: Path) -> None:
    if kind == "folder":
        with new_folder(target) as aside:
            (aside / "part").write_text("whole")
    else:
        with new_files(target) as (file,):
            file.write(b"whole")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_killed_writer_left_goes_and_what_a_live_one_writes_stays(kind, tmp_path, writer):
    target, other = tmp_path / "out", tmp_path / ".out.backup.tmp"
    other.write_text("of somebody else")
    writer(kind, tmp_path / "out2")  # alive, and into another place
    live = hidden(tmp_path)
    killed, _ = writer(kind, target)
    killed.kill()
    killed.wait()
    assert len(hidden(tmp_path)) == len(live) + 1
    writer(kind, target)  # removes what the killed one left, and lives on
    both = hidden(tmp_path)
    assert len(both) == len(live) + 1
    write(kind, target)
    assert hidden(tmp_path) == both
    assert (target / "part" if kind == "folder" else target).read_text() == "whole"


def test_what_a_refused_write_finds_is_removed_too(tmp_path, writer):
    killed, _ = writer("folder", tmp_path / "out")
    killed.kill()
    killed.wait()
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(Exception, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert not hidden(tmp_path)


def test_a_forked_worker_that_outlives_its_parent_still_counts_as_alive(tmp_path, writer):
    killed, worker = writer("folder", tmp_path / "out", child=True)
    killed.kill()
    killed.wait()
    left = hidden(tmp_path)
    write("folder", tmp_path / "out")
    assert hidden(tmp_path) == left and len(left) == 1
    os.kill(worker, signal.SIGKILL)


def test_a_writer_whose_place_is_taken_between_making_and_locking_it_makes_another(tmp_path, monkeypatch):
    import scale.files as files

    real, made = files.tempfile.mkdtemp, []

    def taken_once(**where):
        made.append(real(**where))
        if len(made) == 1:
            Path(made[0]).rmdir()
        return made[-1]

    monkeypatch.setattr(files.tempfile, "mkdtemp", taken_once)
    write("folder", tmp_path / "out")
    assert len(made) == 2 and (tmp_path / "out" / "part").exists() and not hidden(tmp_path)
