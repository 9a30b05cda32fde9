"""What goes wrong on some rank ends all of them soon, with one line that names rank and knob."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_run
from tests.distributed.harness import end, start_train


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run(tmp_path)))
    return path


def said(results: list[tuple[int, str]]) -> list[str]:
    """Every error line of all ranks; no rank may print a traceback."""
    for _, output in results:
        assert "Traceback" not in output, output[-3000:]
    return [line for _, output in results for line in output.splitlines() if line.startswith("scale: error:")]


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        pytest.param(
            [["batch.sequences=9", "batch.micro=3"]] * 2,
            ["batch.sequences = 9", "do not divide among 2 ranks", "batch.sequences=8 or 10"],
            id="world size",
        ),
        pytest.param([["batch.micro=8"]] * 2, ["batch.micro = 8", "the 4 rows", "2 ranks"], id="micro-batch"),
        pytest.param([["compute.strategy=single"]] * 2, ["compute.strategy = 'single'", "2 ranks"], id="single"),
        pytest.param([[], ["optim.lr=0.5"]], ["rank 1:", "optim.lr = 0.5 here, 0.003 on rank 0"], id="another config"),
        pytest.param([["optim.lr=-1"]] * 2, ["optim.lr = -1"], id="same mistake everywhere"),
        pytest.param([[], ["optim.lr=-1"]], ["rank 1:", "optim.lr = -1"], id="mistake on one rank"),
        pytest.param([["compute.device=cuda"]] * 2, ["compute.device = 'cuda'"], id="no GPU"),
        pytest.param([["compute.fsdp.shard=3"]] * 2, ["compute.fsdp.shard = 3"], id="shards"),
        pytest.param([["optim.kind=adamw8bit"]] * 2, ["optim.kind = 'adamw8bit'"], id="optimizer"),
        pytest.param(
            [["compute.strategy=deepspeed", "compute.compile=default"]] * 2,
            ["compute.compile = 'default'", "use fsdp"],
            id="compiled DeepSpeed",
        ),
        pytest.param([["compute.precision=fp8"]] * 2, ["compute.precision = 'fp8'"], id="FP8"),
        pytest.param(
            [["compute.strategy=deepspeed", "compute.deepspeed.config=ds.json"]] * 2,
            ["ds.json", "zero_optimization.stage", "2", "3"],
            id="DeepSpeed JSON",
        ),
    ],
)
def test_refused(config: Path, overrides: list[list[str]], fragments: list[str]) -> None:
    (config.parent / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    overrides = [[word.replace("ds.json", str(config.parent / "ds.json")) for word in words] for words in overrides]
    results = end(start_train([[str(config), *words] for words in overrides]), timeout=60)
    lines = said(results)
    assert len(lines) == 1, lines
    assert all(fragment in lines[0] for fragment in fragments), lines[0]
    assert [code for code, _ in results] == [2, 2]
    assert not (config.parent / "runs").exists()


def test_a_busy_run_folder(config: Path) -> None:
    first = start_train([[str(config), "train.steps=100000"]])
    folder = config.parent / "runs" / "tiny"
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    results = end(start_train([[str(config), "train.steps=100000"]] * 2), timeout=60)
    lines = said(results)
    assert len(lines) == 1 and "is working in this run folder" in lines[0]
    assert [code for code, _ in results] == [2, 2]
    first[0].process.kill()
    first[0].process.wait()


def test_a_killed_rank_ends_the_others(config: Path, tmp_path: Path) -> None:
    outcome = tmp_path / "outcome.json"
    processes = start_train([[str(config), "train.steps=100000"]] * 2, SCALE_OUTCOME=str(outcome))
    wait_for(lambda: steps_of(config) >= 3)
    processes[1].process.kill()
    results = end(processes, timeout=60)
    note = json.loads(outcome.read_text())
    assert results[0][0] == note["exit_code"] == 1 and "lost contact with another rank" in note["text"]
    state = json.loads((config.parent / "runs" / "tiny" / "run_state.json").read_text())
    assert state["status"] == "failed"


@pytest.mark.parametrize("strategy", ["auto", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_hung_rank_ends_the_others(config: Path, strategy: str) -> None:
    """DeepSpeed, here with ZeRO-2, exchanges gradients in process groups of its own: after each of many micro-batches, so
    that the other rank all but surely waits there."""
    words = [
        "batch.sequences=128",
        "batch.micro=1",
        "train.steps=100000",
        "compute.timeout=10",
        f"compute.strategy={strategy}",
        "compute.deepspeed.stage=2",
    ]
    processes = start_train([[str(config), *words]] * 2)
    wait_for(lambda: steps_of(config) >= 3)
    rows = (config.parent / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    time.sleep(0.4 * json.loads(rows[2])["step_time_ms"] / 1000)  # into the middle of a step
    processes[1].process.send_signal(signal.SIGSTOP)
    (result,) = end(processes[:1], timeout=60)
    processes[1].process.kill()
    assert result[0] == 1 and "lost contact with another rank" in said([result])[0]


def test_a_stop_file_stops_all_ranks_after_a_checkpoint(config: Path, tmp_path: Path) -> None:
    stop, outcome = tmp_path / "stop", tmp_path / "outcome.json"
    processes = start_train(
        [[str(config), "train.steps=100000"]] * 2, SCALE_STOP_FILE=str(stop), SCALE_OUTCOME=str(outcome)
    )
    folder = config.parent / "runs" / "tiny"
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    stop.touch()
    results = end(processes, timeout=60)
    assert [code for code, _ in results] == [0, 0], results
    assert json.loads(outcome.read_text())["exit_code"] == 75
    assert json.loads((folder / "run_state.json").read_text())["status"] == "paused"
    assert list((folder / "checkpoints").glob("step_*"))


def test_a_signal_to_one_rank_stops_all(config: Path) -> None:
    processes = start_train([[str(config), "train.steps=100000"]] * 2)
    wait_for(lambda: steps_of(config) >= 3)
    os.kill(processes[1].process.pid, signal.SIGUSR1)
    results = end(processes, timeout=60)
    assert [code for code, _ in results] == [75, 75], results


def test_out_of_memory_on_one_rank_ends_all_and_asks_for_a_smaller_start(config: Path, tmp_path: Path) -> None:
    """Rank 1 may use little more address space than it has after starting; wide rows need more."""
    outcome = tmp_path / "outcome.json"
    wide = ["data.seq_len=2048", "batch.sequences=64", "batch.micro=32", "model.overrides.max_position_embeddings=2048"]
    processes = start_train([[str(config), *wide]] * 2, SCALE_OUTCOME=str(outcome))
    folder = config.parent / "runs" / "tiny"
    wait_for(lambda: (folder / "run_state.json").exists())
    limit_memory(processes[1].process.pid, 64 << 20)
    results = end(processes, timeout=120)
    assert results[1][0] == 76, results[1][1][-2000:]
    assert json.loads(outcome.read_text())["exit_code"] == 76
    assert "out of memory" in json.loads(outcome.read_text())["text"]


def limit_memory(pid: int, more: int) -> None:
    """Let a running process map at most `more` bytes beyond what it has mapped."""
    import resource

    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))


def wait_for(condition, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def steps_of(config: Path) -> int:
    path = config.parent / "runs" / "tiny" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
