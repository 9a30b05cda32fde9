"""Data workers: deaf to signals from their first moment, gone with their trainer, and in one line when they fail."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scale.data.workers import dead_workers_in_one_line, start_reading
from scale.errors import ScaleError
from tests.data.test_source import source
from tests.distributed.harness import ROOT

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


def workers_of(stream) -> list[multiprocessing.process.BaseProcess]:
    before = multiprocessing.active_children()
    stream.draw()
    return [child for child in multiprocessing.active_children() if child not in before]


def test_signals_are_left_to_the_trainer():
    """Also those that come before a worker has chosen its handlers: it begins with all of them blocked."""
    stream = source(2)
    [one, two] = workers_of(stream)
    for number in SIGNALS * 2:
        os.kill(one.pid, number)
    for _ in range(8):
        stream.draw()
    assert one.is_alive() and two.is_alive()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(), "the trainer's own mask is as it was"


def test_a_killed_worker_is_one_line():
    with pytest.raises(ScaleError, match=r"^data.workers: a data worker .*`dmesg` tells.*data.workers=0"):
        with dead_workers_in_one_line():
            stream = source(1)
            [worker] = workers_of(stream)
            os.kill(worker.pid, signal.SIGKILL)
            for _ in range(20):
                stream.draw()
                time.sleep(0.1)


PROGRAM = """
import multiprocessing, os, sys
from tests.data.test_source import source
stream = source(2)
stream.draw()
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
if sys.argv[1] == "kept":  # as an exception's traceback would, until the very end
    multiprocessing.kept = stream
"""


@pytest.mark.parametrize("how", ["killed", "kept", "normal"])
def test_workers_end_with_the_process(how):
    """At a normal exit multiprocessing sends each the SIGTERM that it does not hear, and would wait for ever."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == (-9 if how == "killed" else 0), done.stderr
    deadline = time.monotonic() + 30
    workers = [Path("/proc", pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "Traceback" not in done.stderr


def test_a_signal_while_workers_start_is_neither_lost_nor_too_early():
    class Starting:
        num_workers = 0
        began = ended = False

        def __iter__(self):
            self.began = True
            os.kill(os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + 0.05
            while time.monotonic() < deadline:  # Python would call the handler here
                pass
            self.ended = True
            return iter(())

    loader, before = Starting(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start_reading(loader)
        assert loader.began and loader.ended and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
