"""launch/torchrun.sh with the real `scale train` on the tiny config."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from scale.cluster.environment import rank_environment
from scale.cluster.options import interface_of, read_launch
from scale.errors import UsageError
from tests.conftest import metrics_of
from tests.distributed.harness import ROOT, free_port

SCRIPT = str(ROOT / "launch" / "torchrun.sh")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


@pytest.fixture
def launch() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts launch/torchrun.sh; ends it after the test."""
    started = []

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [SCRIPT, *map(str, arguments)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def train_alone(config: Path) -> list[float]:
    command = [sys.executable, "-m", "scale.cli.main", "train", str(config), "name=alone"]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    return losses(config.parent / "runs" / "alone")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics_of(run) if row.get("loss") is not None]


def test_two_processes_learn_what_one_learns(
    launch: Callable[..., subprocess.Popen[str]], make_config: Callable[..., Path]
) -> None:
    config = make_config()
    process = launch("--ranks-per-node", "2", config)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    run = config.parent / "runs" / "tiny"
    assert len(losses(run)) == 20
    assert losses(run) == pytest.approx(train_alone(config), abs=1e-5)
    [logs] = (run / "logs").iterdir()
    assert {file.name for file in logs.iterdir()} >= {"rank-1.out", "rank-1.err"}


@pytest.mark.slow
def test_two_nodes_learn_what_one_process_learns(
    launch: Callable[..., subprocess.Popen[str]], make_config: Callable[..., Path]
) -> None:
    config = make_config()
    common = ["--nodes", "2", "--ranks-per-node", "1", "--host", "127.0.0.1", "--port", str(free_port())]
    nodes = [launch(*common, "--node-rank", str(rank), config) for rank in (0, 1)]
    results = [node.communicate(timeout=400)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], results
    assert losses(config.parent / "runs" / "tiny") == pytest.approx(train_alone(config), abs=1e-5)


@pytest.mark.slow
def test_stop_and_go_on(launch: Callable[..., subprocess.Popen[str]], make_config: Callable[..., Path]) -> None:
    config = make_config(train={"steps": 300}, checkpoint={"every": 100_000})
    run = config.parent / "runs" / "tiny"
    process = launch("--ranks-per-node", "2", config)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):
            if len(metrics_of(run)) > 3:
                break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert list((run / "checkpoints").glob("step*"))
    process = launch("--ranks-per-node", "2", config)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [row["step"] for row in metrics_of(run)] == list(range(301))


@pytest.mark.slow
def test_a_rank_that_cannot_start_is_one_line(
    launch: Callable[..., subprocess.Popen[str]], make_config: Callable[..., Path]
) -> None:
    config = make_config()
    (config.parent / "corpus.jsonl").unlink()
    process = launch("--ranks-per-node", "2", config)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert "corpus.jsonl" in err.splitlines()[-1]
    assert err.count("scale: error") == 1
    assert not (config.parent / "runs" / "tiny").exists()


def test_wrong_config_is_refused_before_anything_starts(
    launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = launch("--ranks-per-node", "2", tmp_path / "none.yaml")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, len(err.splitlines())) == (2, 1)


def test_options_come_from_the_command_line_then_the_environment() -> None:
    given = {"NNODES": "3", "GPUS_PER_NODE": "8", "NODE_RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4000"}
    launch, args = read_launch(["--gpus", "4", "c.yaml", "a.b=1"], given)
    assert (launch.ranks_per_node, launch.nodes, launch.node_rank, launch.host, launch.port) == (
        4,
        3,
        2,
        "127.0.0.1",
        4000,
    )
    assert (str(args.config), args.overrides) == ("c.yaml", ["a.b=1"])


def test_slurm_variables() -> None:
    given = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "77"}
    given |= {"SLURM_RESTART_COUNT": "3", "MASTER_ADDR": "127.0.0.1"}
    launch, _ = read_launch(["c.yaml"], given)
    assert (launch.ranks_per_node, launch.nodes, launch.node_rank, launch.identity) == (8, 2, 1, "77r3")


@pytest.mark.parametrize(
    "options",
    [
        ["--ranks-per-node", "0", "c.yaml"],
        ["--gpus", "all", "c.yaml"],
        ["--gpus", "2", "--nodes", "2", "c.yaml"],
        ["--gpus", "2", "--nodes", "2", "--node-rank", "2", "--host", "127.0.0.1", "c.yaml"],
        ["--gpus", "2", "--nodes", "2", "--node-rank", "0", "c.yaml"],
        ["--gpus", "2", "c.yaml", "--frobnicate"],
        [],
    ],
)
def test_wrong_options(options: list[str]) -> None:
    with pytest.raises(UsageError):
        read_launch(options, {})


def test_rank_environment_keeps_what_the_user_set(tmp_path: Path) -> None:
    given = {"OMP_NUM_THREADS": "7", "TORCH_NCCL_TRACE_BUFFER_SIZE": "10"}
    added = rank_environment(given, 1, tmp_path, None)
    assert not {"OMP_NUM_THREADS", "TORCH_FR_BUFFER_SIZE", "GLOO_SOCKET_IFNAME"} & set(added)
    added = rank_environment({}, len(os.sched_getaffinity(0)), tmp_path, "lo")
    assert (added["OMP_NUM_THREADS"], added["GLOO_SOCKET_IFNAME"]) == ("1", "lo")
    assert added["TORCH_FR_DUMP_TEMP_FILE"].startswith(str(tmp_path))


def test_interface_of_loopback() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None
