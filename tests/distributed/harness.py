"""Runs a function in several real processes that form one process group over gloo, and brings their results back."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A TCP port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_env(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment that torchrun would give a rank."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONFAULTHANDLER": "1",
    }


def run_ranks(target: str, world_size: int = 2, timeout: float = 240, **arguments: Any) -> list[Any]:
    """Call `package.module:function` as `function(ranks, **arguments)` in each of `world_size` processes.

    Arguments and results travel as JSON; results come back by rank. A failing rank fails the test with its output.
    """
    skip_without_deepspeed(str(arguments.get("kind")).startswith("zero"))
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.distributed.harness", target, json.dumps(arguments), folder]
        started = [_start(command, rank_env(rank, world_size, port)) for rank in range(world_size)]
        results = end(started, timeout)
        for rank, (code, _) in enumerate(results):
            assert code == 0, f"rank {rank} exited with {code}:\n" + "\n".join(
                f"--- rank {r} ---\n{text[-4000:]}" for r, (_, text) in enumerate(results)
            )
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


def skip_without_deepspeed(needed: bool) -> None:
    """End a test that runs DeepSpeed where it is not installed."""
    if needed:
        import pytest  # not in every rank

        pytest.importorskip("deepspeed")


class Started(NamedTuple):
    """A process and the file that its output goes to (a pipe that nobody reads would fill up and block it)."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace")


def _start(command: Sequence[str], environment: Mapping[str, str]) -> Started:
    output = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process object
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    return Started(process, output)


def start_train(arguments: Sequence[Sequence[str]], **environment: str) -> list[Started]:
    """Start `scale train` in one process for each list of arguments, as the ranks of one run."""
    skip_without_deepspeed(any("compute.strategy=deepspeed" in words for words in arguments))
    port, world_size = free_port(), len(arguments)
    alone = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return [
        _start(
            [sys.executable, "-m", "scale.cli.main", "train", *words],
            (rank_env(rank, world_size, port) if world_size > 1 else alone) | environment,
        )
        for rank, words in enumerate(arguments)
    ]


def end(started: Sequence[Started], timeout: float = 240) -> list[tuple[int, str]]:
    """Exit code and output of each process; what is still there after `timeout` seconds in all is killed and fails."""
    deadline = time.monotonic() + timeout
    try:
        for one in started:
            one.process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still there after {timeout:g} s:\n{_where(started)}") from None
    finally:
        for one in started:
            one.process.kill()
    return [(one.process.returncode, one.said()) for one in started]


def _where(started: Sequence[Started]) -> str:
    """What each process said, and the Python stacks of those that hang (faulthandler answers SIGABRT)."""
    for one in started:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(10)
    return "\n".join(f"--- {n}: {one.process.poll()} ---\n{one.said()[-6000:]}" for n, one in enumerate(started))


def train(path: Path, world_size: int, *overrides: str) -> None:
    """Run a config to its end in `world_size` processes."""
    for code, output in end(start_train([[str(path), *overrides]] * world_size)):
        assert code == 0, output[-4000:]


def _main() -> None:
    target, arguments, folder = sys.argv[1:]
    import torch

    from scale.cli.launched import end_process
    from scale.parallel.ranks import join, leave

    torch.set_num_threads(1)
    module, _, function = target.partition(":")
    ranks = join("cpu")
    result = getattr(importlib.import_module(module), function)(ranks, **json.loads(arguments))
    Path(folder, f"{ranks.rank}.json").write_text(json.dumps(result))
    ranks.barrier()
    leave()
    end_process(0)


if __name__ == "__main__":
    _main()
