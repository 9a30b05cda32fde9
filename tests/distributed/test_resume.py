"""A run goes on with another number of ranks and under another strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.conftest import metrics_of, tiny_run
from tests.distributed.harness import train

FSDP, ZERO2, ZERO3, SINGLE = (
    ("compute.strategy=fsdp",),
    ("compute.strategy=deepspeed", "compute.deepspeed.stage=2"),
    ("compute.strategy=deepspeed", "compute.deepspeed.stage=3"),
    ("compute.strategy=single",),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two micro-batches per rank of two, clipping active, a save in the middle; the uninterrupted run as `whole`."""
    folder = tmp_path_factory.mktemp("resume")
    run = tiny_run(folder, batch={"sequences": 8, "micro": 2}, eval={"every": 5, "tokens": 1024})
    run["optim"] = {"lr": 3e-3, "clip": 0.5}
    run["checkpoint"] = {"every": 10, "keep_last": 2}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    train(path, 1, "name=whole")
    return path


def losses(config: Path, name: str) -> list[float]:
    return [row["loss"] for row in metrics_of(config.parent / "runs" / name) if row["loss"] is not None]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param((1, SINGLE), (2, FSDP), id="single to fsdp"),
        pytest.param((2, FSDP), (1, SINGLE), id="fsdp to single"),
        pytest.param((2, FSDP), (1, FSDP), id="fsdp 2 to 1"),
        pytest.param((1, FSDP), (2, FSDP), id="fsdp 1 to 2"),
        pytest.param((2, FSDP), (2, ZERO3), id="fsdp to ZeRO-3"),
        pytest.param((2, ZERO3), (2, FSDP), id="ZeRO-3 to fsdp"),
        pytest.param((2, ZERO3), (1, ZERO3), id="ZeRO-3 2 to 1"),
        pytest.param((2, ZERO2), (1, SINGLE), id="ZeRO-2 to single"),
        pytest.param((1, SINGLE), (2, ZERO2), id="single to ZeRO-2"),
    ],
)
@pytest.mark.slow
def test_the_losses_go_on(config: Path, first, then, request: pytest.FixtureRequest) -> None:
    name = "".join(c for c in request.node.callspec.id if c.isalnum())
    for (world_size, strategy), steps in ((first, 10), (then, 20)):
        allow = ["--allow-change", "train.steps"]
        schedule = ["schedule.kind=constant", "schedule.warmup=2"]
        train(config, world_size, f"name={name}", f"train.steps={steps}", *schedule, *strategy, *allow)
    whole = f"whole{len(first)}constant"
    if not (config.parent / "runs" / whole).exists():
        train(config, 1, f"name={whole}", *schedule)
    assert losses(config, name) == pytest.approx(losses(config, whole), rel=1e-5)
    assert len(losses(config, name)) == 20
