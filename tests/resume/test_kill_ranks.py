"""SIGKILL of one rank or of all, at random moments and during saves: the continued run writes the very same metrics."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import yaml

from scale.checkpoint.saved import latest_good
from tests.conftest import metrics_of, tiny_run
from tests.distributed.harness import end, start_train
from tests.resume.test_kill import half_written, rows

KILLS, DURING_SAVE = 10, 3
STEPS = 100
WORLD = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    run = tiny_run(
        folder,
        train={"steps": STEPS},
        batch={"sequences": 8, "micro": 2},
        checkpoint={"every": 4, "keep_last": 2, "keep_best": 1},
        eval={"every": 8, "tokens": 512},
    )
    run["data"] |= {"workers": 1, "curriculum": [{"until": 0.3, "seq_len": 16}, {"until": 0.6, "seq_len": 32}]}
    # wide enough that writing takes a while, and with random numbers in every forward pass
    run["model"]["overrides"] |= {"hidden_size": 192, "intermediate_size": 512, "attention_dropout": 0.1}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def kill_once(arguments: list[str], folder: Path, who: list[int], during_save: bool, rng: random.Random) -> bool:
    """Start all ranks, wait for a random moment, SIGKILL those of `who`; the others must end by themselves. True if a
    checkpoint was being written at that moment."""
    processes = start_train([arguments] * WORLD)
    goal, first = rng.randint(1, 6), None
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for one in processes:
            assert one.process.poll() is None, one.said()[-3000:]
        if during_save and first is not None and rows(folder) != first and half_written(folder):
            time.sleep(rng.uniform(0, 0.02))
            break
        state = folder / "run_state.json"
        if first is None and state.exists() and '"running"' in state.read_text():
            first = rows(folder)
        if not during_save and first is not None and rows(folder) >= first + goal:
            time.sleep(rng.uniform(0, 0.1))
            break
        time.sleep(0.0005)
    for rank in who:
        processes[rank].process.kill()
    saving = bool(half_written(folder))
    for rank, (code, output) in enumerate(end(processes, timeout=120)):
        assert code == (-9 if rank in who else 1), output[-3000:]
    return saving


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_kills_leave_no_trace_in_the_metrics(config: Path, strategy: str) -> None:
    runs = config.parent / "runs"
    chosen = [str(config), f"compute.strategy={strategy}"]
    for code, output in end(start_train([[*chosen, f"name=whole-{strategy}"]] * WORLD), timeout=600):
        assert code == 0, output[-3000:]
    name, rng, during_save = f"killed-{strategy}", random.Random(0), 0
    folder, arguments = runs / name, [*chosen, f"name={name}"]
    for kill in range(KILLS):
        who = [[0, 1], [1], [0]][kill % 3]
        during_save += kill_once(arguments, folder, who, during_save=kill % 2 == 0, rng=rng)
    print(f"{strategy}: {KILLS} kills, {during_save} of them during a save")
    assert during_save >= DURING_SAVE, f"only {during_save} kills hit a save"
    assert rows(folder) < STEPS, "the run was over before the last kill"
    for code, output in end(start_train([arguments] * WORLD), timeout=600):
        assert code == 0, output[-3000:]
    whole = runs / f"whole-{strategy}"
    assert metrics_of(folder) == metrics_of(whole)
    assert len(metrics_of(whole)) == STEPS + 1
    a, b = (latest_good(f / "checkpoints", print) for f in (whole, folder))
    assert a is not None and b is not None
    assert a.state() == b.state()
