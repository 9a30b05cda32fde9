"""What ranks have to agree on: held-out loss, damaged checkpoints, devices, random numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from scale.checkpoint.store import Checkpoints
from scale.checks import check_same_device
from scale.errors import Elsewhere, UsageError
from scale.hardware import detect
from tests.conftest import metrics_of, tiny_run
from tests.distributed.harness import run_ranks, train


def held_out(folder: Path, name: str) -> list[tuple[float, dict[str, float]]]:
    return [
        (r["val_loss"], r["val_by_source"]) for r in metrics_of(folder / "runs" / name) if r["val_loss"] is not None
    ]


def test_two_ranks_score_what_one_scores(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, train={"steps": 3}, eval={"every": 1, "tokens": 700})  # 11 rows: one rank has one more
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    train(path, 1, "name=one")
    train(path, 2, "name=two")
    one, two = held_out(tmp_path, "one"), held_out(tmp_path, "two")
    assert len(one) == 4
    for (loss, by_source), (expected, expected_by_source) in zip(two, one, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5) and by_source == pytest.approx(expected_by_source, rel=1e-5)


def save_damage_and_find(ranks, folder):
    """Two checkpoints of which the newer has a flipped byte in a file that is not rank 0's to verify."""
    said: list[str] = []
    store = Checkpoints(Path(folder), 5, 0, said.append, ranks)
    for step in (1, 2):
        store.save(step, {f"model/rank{ranks.rank}": torch.full((1000,), float(step))}, {"rank": ranks.rank}, None)
    store.wait()
    ranks.barrier()
    if ranks.rank == 0:
        names = sorted(p.name for p in (Path(folder) / "step_00000002").iterdir() if p.name != "manifest.json")
        damaged = Path(folder) / "step_00000002" / names[1]
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    ranks.barrier()
    found = store.latest_good()
    mine = {f"model/rank{r}": torch.zeros(1000) for r in range(ranks.world_size)}
    found.read(mine)
    return [found.step, found.state(), [float(t.mean()) for t in mine.values()], len(said)]


def test_damage_in_a_part_that_another_rank_verifies_is_found_by_all(tmp_path: Path) -> None:
    results = run_ranks("tests.distributed.test_agreement:save_damage_and_find", folder=str(tmp_path / "checkpoints"))
    assert results == [[1, {"rank": 0}, [1.0, 1.0], 1]] * 2


def devices(ranks):
    from dataclasses import replace

    hardware = detect("cpu")
    if ranks.rank == 1:
        hardware = replace(hardware, device="cuda", name="NVIDIA H100", capability=(9, 0))
    try:
        check_same_device(hardware, ranks)
    except (UsageError, Elsewhere) as error:
        return [type(error).__name__, str(error)]
    return None


def test_another_device_on_one_rank_is_refused_by_that_rank() -> None:
    first, second = run_ranks("tests.distributed.test_agreement:devices")
    assert second[0] == "UsageError" and "compute.device: NVIDIA H100 (cuda) here" in second[1]
    assert first[0] == "Elsewhere" and first[1].startswith("rank 1:")


def first_random_number(ranks, folder):
    from scale.config.run import FsdpConfig
    from scale.parallel.fsdp import Fsdp
    from tests.test_trainer import trainer

    made = trainer(Path(folder), steps=1, strategy=Fsdp(ranks, FsdpConfig()))
    seen: list[float] = []
    made.stepper.rehearse = lambda source: seen.append(float(torch.rand(())))  # type: ignore[method-assign]
    made.fit()
    return seen


def test_ranks_draw_different_random_numbers(tmp_path: Path) -> None:
    (first,), (second,) = run_ranks(
        "tests.distributed.test_agreement:first_random_number", folder=str(tmp_path / "run")
    )
    assert first != second
