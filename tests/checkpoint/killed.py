"""Forks writers of checkpoints and kills each at another instant; exits 1 if a broken checkpoint is ever left.

Instants: the n-th file operation for every n (an audit hook kills the writer right before it), then random times.
Run by test_checkpoint_kill.py; prints how many writers died.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from scale.checkpoint.saved import latest_good, saved_in
from scale.checkpoint.store import Checkpoints

WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.listdir", "os.scandir")


def work(folder: Path, first: int, saves: int) -> None:
    store = Checkpoints(folder, keep_last=1, keep_best=1)
    for step in range(first, first + saves):
        # step 3 is written twice: the second replaces the first
        for _ in range(2 if step == 3 else 1):
            store.save(step, {"w": torch.full((50_000,), float(step))}, {"step": step}, float(-step % 3))
    store.wait()


def die_before(n: int, folder: Path) -> None:
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event in WATCHED and str(folder) in str(args[0]):
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def fork(n: int | None, folder: Path, first: int, saves: int, seconds: float = 0) -> bool:
    """True if the writer was killed; False if it came to its end."""
    before = entries(folder)
    pid = os.fork()
    if pid == 0:
        if n is not None:
            die_before(n, folder)
        work(folder, first, saves)
        os._exit(0)
    if n is None:
        limit = time.monotonic() + 60
        while entries(folder) == before and time.monotonic() < limit:  # on a busy machine a start takes its time
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def check(folder: Path, at_least: int) -> int:
    """Every checkpoint verifies and holds its own step; the newest is not older than before."""
    newest = 0
    for saved in saved_in(folder):
        saved.verify()
        blank = {"w": torch.zeros(50_000)}
        saved.read(blank)
        assert bool((blank["w"] == saved.step).all()) and saved.state() == {"step": saved.step}
        newest = saved.step
    assert newest >= at_least, f"step {newest} after step {at_least} had been there"
    return newest


def main(root: Path) -> None:
    torch.set_num_threads(1)
    deaths, n = 0, 1
    while fork(n, root / str(n), 1, 4):  # a fresh folder each: every single operation of four saves
        check(root / str(n), 0)
        Checkpoints(root / str(n), 1, 1)  # cleans up
        check(root / str(n), 0)
        assert not list((root / str(n)).glob(".*")) if (root / str(n)).exists() else True
        deaths, n = deaths + 1, n + 1
    newest, folder = 0, root / "random"
    for _ in range(15):  # the same folder over and over
        deaths += fork(None, folder, newest + 1, 10_000, random.uniform(0.005, 0.3))
        newest = check(folder, newest)
    assert newest > 3, "the random writers never got to write anything"
    good = latest_good(folder, print)
    assert good is not None and good.step == newest
    print("deaths", deaths)


main(Path(sys.argv[1]))
