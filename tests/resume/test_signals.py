"""Pairs of signals at random moments: every process goes, with a documented exit code, and the run goes on as if nothing
had been. `SCALE_SIGNAL_PAIRS=200 pytest -m slow tests/resume/test_signals.py -k one_process` sends as many as you like."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.conftest import metrics_of, tiny_run
from tests.resume.warm import ROOT, Warm

PAIRS = int(os.environ.get("SCALE_SIGNAL_PAIRS", "24"))
LAUNCHED = int(os.environ.get("SCALE_SIGNAL_PAIRS_LAUNCHED", "4"))
SEED = int(os.environ.get("SCALE_SIGNAL_SEED", "0"))
SECONDS = float(os.environ.get("SCALE_SIGNAL_SECONDS", "60"))
"""Until every process has gone. On an idle machine 10 are more than enough."""
STEPS = 300
MOMENTS = ("start", "preparation", "loading", "step", "save", "exit")
GAPS = (0.0, 0.005, 0.03, 0.1, 0.3)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def hears_ctrl_c() -> None:
    """What a shell starts in the background inherits that SIGINT is ignored, until it chooses otherwise."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def write_config(folder: Path) -> Path:
    run = tiny_run(
        folder,
        train={"steps": STEPS},
        checkpoint={"every": 20, "keep_last": 2, "keep_best": 0},
        eval={"every": 100, "tokens": 512},
    )
    run["compute"] = {"threads": 1}
    run["model"]["overrides"] |= {"attention_dropout": 0.1}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def of_session(leader: int) -> dict[int, str]:
    """Process id and command of everything alive in the session of a process."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = stat.read_text().partition(") ")
            state, _, _, session = rest.split()[:4]
            if int(session) == leader and state != "Z":
                found[int(stat.parent.name)] = name
    return found


def rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def state(run: Path) -> str:
    path = run / "run_state.json"
    return path.read_text() if path.exists() else ""


class Pair:
    """One start of a run, and two signals to it."""

    def __init__(self, folder: Path, run: Path, rng: random.Random):
        self.folder, self.run, self.rng = folder, run, rng
        self.moment, self.gap = rng.choice(MOMENTS), rng.choice(GAPS)
        self.numbers = [rng.choice(SIGNALS) for _ in range(2)]
        self.to_all = [rng.random() < 0.5 for _ in range(2)]
        self.workers = rng.randint(0, 4)
        self.output = folder / "output.txt"
        self.output.write_text("")
        if self.moment == "preparation":
            shutil.rmtree(folder / "cache", ignore_errors=True)
        self.before, self.state_before = rows(run), state(run)
        self.words = ["train", str(folder / "run.yaml"), f"name={run.name}", f"data.workers={self.workers}"]

    def __str__(self) -> str:
        sent = [
            f"{number.name} to {'all' if every else 'one'}"
            for number, every in zip(self.numbers, self.to_all, strict=True)
        ]
        return f"{self.moment}, {self.workers} workers: {sent[0]}, {self.gap} s later {sent[1]}"

    def wait_for_moment(self, pid: int) -> None:
        """Or for the end of the process."""
        if self.moment == "start":
            time.sleep(self.rng.uniform(0, 3))
            return
        row = self.before + self.rng.randint(1, 8)
        reached: dict[str, Callable[[], bool]] = {
            "preparation": lambda: any((self.folder / "cache").glob("*")),
            "loading": lambda: state(self.run) != self.state_before and (self.workers == 0 or len(of_session(pid)) > 1),
            "step": lambda: self.began() and rows(self.run) >= row,
            "save": lambda: self.began() and any((self.run / "checkpoints").glob(".tmp-*")),
            "exit": lambda: self.began() and rows(self.run) >= row,
        }
        while not reached[self.moment]() and of_session(pid):
            time.sleep(0.001)
        time.sleep(self.rng.uniform(0, 0.3 if self.moment == "preparation" else 0.05))

    def began(self) -> bool:
        """Whether the run state is of this start (a resumed one cuts the metrics before it says that it is running)."""
        return state(self.run) != self.state_before and '"running"' in state(self.run)

    def send(self, pid: int) -> None:
        for index, (number, every) in enumerate(zip(self.numbers, self.to_all, strict=True)):
            if index == 1 and self.moment == "exit":
                while not any(f'"{word}"' in state(self.run) for word in ("paused", "completed")) and of_session(pid):
                    time.sleep(0.001)
            elif index == 1:
                time.sleep(self.gap)
            with suppress(ProcessLookupError):
                (os.killpg if every else os.kill)(pid, number)


def send_pair(pair: Pair, warm: Warm) -> tuple[int, float]:
    """Exit code of the process, and how long all processes took to go after the second signal."""
    process = None
    if pair.moment == "start":
        with pair.output.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "scale.cli.main", *pair.words],
                cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        pid = process.pid
    else:
        pid = warm.start(pair.words, pair.output)
    pair.wait_for_moment(pid)
    pair.send(pid)
    sent = time.monotonic()
    while left := of_session(pid):
        if time.monotonic() - sent > SECONDS:
            for one in left:
                os.kill(one, signal.SIGKILL)
            pytest.fail(f"{pair}: {left} still there after {SECONDS:g} s\n{pair.output.read_text()[-3000:]}")
        time.sleep(0.005)
    took = time.monotonic() - sent
    return process.wait() if process is not None else warm.wait(), took


def check(pair: Pair, code: int) -> None:
    """The exit code is the one that the README gives, and says what it says there."""
    said = pair.output.read_text()
    if code < 0:  # Python itself was still starting
        assert pair.moment == "start" and -code in SIGNALS and not said.startswith("device"), f"{pair}: {code}\n{said}"
        return
    assert code in (0, 75, 130), f"{pair}: {code}\n{said}"
    assert "Traceback" not in said, f"{pair}: {code}\n{said}"
    if code == 75 and "stopped: step" in said:
        done = rows(pair.run) - 1
        assert (pair.run / "checkpoints" / f"step_{done:08d}").is_dir() or done <= 0, f"{pair}\n{said}"
        assert '"paused"' in state(pair.run), f"{pair}\n{said}"
    if code == 0:
        assert rows(pair.run) == STEPS + 1


@pytest.mark.slow
@pytest.mark.timeout(60 + 60 * PAIRS)
def test_pairs_of_signals_to_one_process(tmp_path: Path) -> None:
    rng, folder = random.Random(SEED), tmp_path
    write_config(folder)
    warm, codes, slowest, runs = Warm(), Counter[int](), 0.0, [folder / "runs" / "signalled0"]
    try:
        assert run_to_end(warm, folder, "whole") == 0
        whole = metrics_of(folder / "runs" / "whole")
        for _ in range(PAIRS):
            pair = Pair(folder, runs[-1], rng)
            code, took = send_pair(pair, warm)
            print(f"{pair}: exit code {code}, gone in {took:.2f} s, {rows(runs[-1])} rows", flush=True)
            check(pair, code)
            codes[code], slowest = codes[code] + 1, max(slowest, took)
            if code == 0:
                runs.append(folder / "runs" / f"signalled{len(runs)}")
        assert run_to_end(warm, folder, runs[-1].name) == 0
    finally:
        warm.close()
    print(f"{PAIRS} pairs: exit codes {dict(codes)}, slowest {slowest:.2f} s, {len(runs)} runs")
    assert all(metrics_of(run) == whole for run in runs)


def run_to_end(warm: Warm, folder: Path, name: str) -> int:
    warm.start(["train", str(folder / "run.yaml"), f"name={name}"], folder / "output.txt")
    return warm.wait()


def marked(mark: str) -> list[int]:
    """Processes, in whatever session, that were started with this in their environment."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"SCALE_TEST_MARK={mark}".encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_pairs_of_signals_to_a_launcher_of_two_ranks(tmp_path: Path) -> None:
    rng, run = random.Random(SEED), tmp_path / "runs" / "launched"
    config, output = write_config(tmp_path), tmp_path / "output.txt"
    words = ["bash", "launch/torchrun.sh", "--ranks-per-node", "2", str(config), "data.workers=1", "train.steps=60"]
    mark, codes = f"{tmp_path}-", Counter[int]()

    def start(name: str, number: int) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "SCALE_TEST_MARK": f"{mark}{number}",
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
        }
        with output.open("wb") as file:
            return subprocess.Popen(
                [*words, f"name={name}"], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    for number in range(LAUNCHED):
        before, moment, gap = rows(run), rng.choice(("start", "step")), rng.choice((0.005, 0.03, 0.3, 1.0))
        numbers, to_all = [rng.choice(SIGNALS) for _ in range(2)], rng.random() < 0.5
        process = start(run.name, number)
        time.sleep(rng.uniform(0, 20) if moment == "start" else 0)
        while moment == "step" and rows(run) < before + 2 and process.poll() is None:
            time.sleep(0.01)
        for one in numbers:
            with suppress(ProcessLookupError):
                (os.killpg if to_all else os.kill)(process.pid, one)
            time.sleep(gap)
        sent = time.monotonic()
        while left := marked(f"{mark}{number}"):
            assert time.monotonic() - sent < SECONDS, (
                f"{moment}, {numbers}, {gap} s: {left}\n{output.read_text()[-3000:]}"
            )
            process.poll()
            time.sleep(0.02)
        code = process.wait()
        codes[code] += 1
        took, done = time.monotonic() - sent, rows(run)
        print(
            f"{moment}, {numbers}, {gap} s, all {to_all}: exit code {code}, gone in {took:.2f} s, {done} rows",
            flush=True,
        )
        second = code == 1 and "killed by a second signal" in output.read_text()
        early = moment == "start" and -code in SIGNALS  # before the first line of the launcher
        assert code in (0, 75, 130) or second or early, f"{code}\n{output.read_text()[-3000:]}"
    assert start(run.name, LAUNCHED).wait() == 0 and start("whole", LAUNCHED).wait() == 0
    assert metrics_of(run) == metrics_of(tmp_path / "runs" / "whole")
