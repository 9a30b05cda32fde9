"""A data command that was killed leaves nothing that the next one does not remove."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from scale.cli.main import main

SLOW = """
import sys, time
from scale.data import clean, ingest, splitting
from scale.cli.main import main
def slowed(function):
    def slow(*arguments):
        time.sleep(0.05)
        return function(*arguments)
    return slow
clean.normalised, clean._line, ingest.hash_of = map(slowed, (clean.normalised, clean._line, ingest.hash_of))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("words", [
    "clean in.csv --out out/new.jsonl", "split in.csv --out out", "tokenize in.csv --out out/new --vocab-size 270",
])  # fmt: skip
def test_killed_then_run_again(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"row {i},{json.dumps(i)}\n" for i in range(200))
    (tmp_path / "in.csv").write_text(f"text,n\n{rows}")
    killed = subprocess.Popen([sys.executable, "-c", SLOW, "data", *words.split()])
    while not list((tmp_path / "out").glob(".*.tmp")):
        assert killed.poll() is None, "finished before it could be killed"
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert list((tmp_path / "out").glob(".*.tmp"))
    assert main(["data", *words.split()]) == 0
    assert not list((tmp_path / "out").glob(".*")) and list((tmp_path / "out").iterdir())
