"""Training on a real Ray cluster of one machine: same numbers as alone, stop, killed ranks. Never `ray stop`: it ends all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import metrics_of
from tests.distributed.harness import ROOT, free_port

pytest.importorskip("ray")
pytest.importorskip("aiohttp_cors", reason="the job API needs ray[default]")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).with_name("ray"))
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """Environment of commands that use a cluster of this test's own."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets below it need a short path
    port, dashboard = free_port(), free_port()
    options = f"--node-ip-address=127.0.0.1 --port={port} --num-cpus=4 --object-store-memory=80000000"
    options += f" --dashboard-host=127.0.0.1 --dashboard-port={dashboard} --disable-usage-stats --temp-dir={folder}"
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", *options.split()],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    environment = ENVIRONMENT | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    try:
        deadline = time.monotonic() + 120
        while subprocess.run([RAY, "job", "list"], env=environment, capture_output=True, timeout=60).returncode:
            assert process.poll() is None and time.monotonic() < deadline, "no Ray cluster"
            time.sleep(0.5)
        yield environment | {"HEAD": f"127.0.0.1:{port}"}
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def driver(head: dict[str, str], config: Path, *more: str) -> subprocess.Popen[str]:
    """launch/ray_train.py on the cluster, without the job API."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "ray_train.py"), str(config), "--address", head["HEAD"], *more],
        env=head,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(what: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 240
    while not what():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


def rank_process(run: Path, rank: int) -> int:
    """Process id of a rank that trains in this folder's config."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"scale.cli.main" in (folder / "cmdline").read_bytes():
                variables = (folder / "environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in variables and str(run).encode() in (folder / "cmdline").read_bytes():
                    return int(folder.name)
    return 0


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics_of(run) if row.get("loss") is not None]


def test_job_learns_what_one_process_learns(head: dict[str, str], make_config: Callable[..., Path]) -> None:
    config = make_config()
    runs = config.parent / "runs"
    alone = [sys.executable, "-m", "scale.cli.main", "train", str(config), "name=alone"]
    subprocess.run(alone, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    script = [sys.executable, str(ROOT / "launch" / "ray_train.py")]
    job = subprocess.run(
        [RAY, "job", "submit", "--", *script, str(config), "name=ray", "--ranks", "2"],
        env=head,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "completed: step 20 of 20" in job.stdout
    assert len(losses(runs / "ray")) == 20
    assert losses(runs / "ray") == pytest.approx(losses(runs / "alone"), abs=1e-5)


def test_first_error_and_exit_code(head: dict[str, str], make_config: Callable[..., Path]) -> None:
    config = make_config()
    (config.parent / "corpus.jsonl").unlink()
    refused = driver(head, config, "--ranks", "2")
    output = refused.communicate(timeout=300)[0]
    assert refused.returncode == 2, output
    assert output.splitlines()[-1].startswith("scale: error: ")
    assert "corpus.jsonl" in output.splitlines()[-1]
    assert output.count("scale: error") == 1


def test_killed_rank_is_answered_by_a_new_start(head: dict[str, str], make_config: Callable[..., Path]) -> None:
    config = make_config(train={"steps": 400}, checkpoint={"every": 5})
    run = config.parent / "runs" / "tiny"
    process = driver(head, config, "--ranks", "2", "--retries", "1")
    wait_for(lambda: list((run / "checkpoints").glob("step*")), process)
    os.kill(rank_process(config, 1), signal.SIGKILL)
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    assert "rank 1: killed by SIGKILL" in output
    assert "starting again from the last checkpoint" in output
    assert [row["step"] for row in metrics_of(run)] == list(range(401))


def test_ray_job_stop_leaves_a_checkpoint(head: dict[str, str], make_config: Callable[..., Path]) -> None:
    config = make_config(train={"steps": 100_000}, checkpoint={"every": 1_000_000})
    run = config.parent / "runs" / "tiny"
    script = [sys.executable, str(ROOT / "launch" / "ray_train.py"), str(config), "--ranks", "2"]
    submit = [RAY, "job", "submit", "--no-wait", "--submission-id", "stopped", "--", *script]
    subprocess.run(submit, env=head, check=True, capture_output=True, timeout=120)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics_of(run)) > 3)
    subprocess.run([RAY, "job", "stop", "stopped"], env=head, check=True, capture_output=True, timeout=120)
    wait_for(lambda: json.loads((run / "run_state.json").read_text())["status"] == "paused")
    assert list((run / "checkpoints").glob("step*"))
    wait_for(lambda: not rank_process(config, 0) and not rank_process(config, 1))
