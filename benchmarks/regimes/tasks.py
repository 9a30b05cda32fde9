"""The tasks of the regime table: what is trained, for how long, and with which predictor."""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.regimes import smooth
from scale.api import CheckpointConfig, OptimConfig, ScheduleConfig, Single, SpikeConfig, Trainer
from scale.config.predict import PredictConfig
from scale.monitor.records import read_rows
from scale.predict.stepper import PredictiveStepper
from scale.protocols import Stepper
from scale.train.step import BackwardStepper

Around = Callable[[BackwardStepper], Stepper]


@dataclass(frozen=True)
class Task:
    """One row of the table. `steps` was fixed where the full run still falls by 1% or more per tenth of its steps."""

    name: str
    regime: str
    data: Callable[[int], Any]
    model: Callable[[], nn.Module]
    objective: Callable[[], Any]
    batch: int | None
    steps: int
    lr: float
    schedule: Mapping[str, Any]
    predict: Mapping[str, Any]
    margin: float = 0.001
    """Relative change of the held-out loss that counts as not worse."""
    lrs: tuple[float, ...] = field(default=())
    """Learning rates that the control at the shorter horizon may choose from."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. Passes in full batches; `seconds` of training alone; `curve` is (step, held-out loss)."""

    loss: float
    backward: int
    forward: int
    seconds: float
    active: float
    """Share of the run's steps that were predicted."""
    curve: list[tuple[int, float]]
    ledger: dict[str, Any] | None


def run(
    task: Task, seed: int, steps: int | None = None, lr: float | None = None, around: Around | None = None
) -> Outcome:
    """Train from the start, in a folder that is removed afterwards."""
    steps = steps or task.steps
    x, y, x_held, y_held = task.data(seed)
    torch.manual_seed(seed)
    model = task.model()
    folder = Path(tempfile.mkdtemp(prefix="scale-regime-"))
    try:
        trainer = Trainer(
            model,
            smooth.Shuffled(x, y, task.batch, seed),
            task.objective(),
            folder=folder / "run",
            steps=steps,
            seed=seed,
            optim=OptimConfig(lr=lr or task.lr, weight_decay=0.0, betas=(0.9, 0.99)),
            schedule=ScheduleConfig(**task.schedule),
            spike=SpikeConfig(sigma=0),
            checkpoint=CheckpointConfig(every=10**9, keep_last=1, keep_best=0),
            strategy=Single("cpu"),
            judge=lambda root: smooth.HeldOut(root, x_held, y_held),
            eval_every=max(1, steps // 10),
            layer_gradients=0,
            around=around,
        )
        start = time.perf_counter()
        trainer.fit()
        seconds = time.perf_counter() - start
        return outcome_of(folder / "run", seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def outcome_of(folder: Path, seconds: float) -> Outcome:
    """What the rows of a finished run say."""
    rows = read_rows(folder / "metrics.jsonl")
    last = rows[-1]
    predicted = sum(row["was_predicted"] for row in rows)
    curve = [(row["step"], row["val_loss"]) for row in rows if row["val_loss"] is not None]
    return Outcome(
        loss=last["val_loss"],
        backward=last["backward_passes"],
        forward=last["forward_passes"],
        seconds=seconds,
        active=predicted / last["step"],
        curve=curve,
        ledger=last["ledger"],
    )


def predictive(task: Task, **changes: Any) -> Around:
    """The predictor of a task; `changes` replace entries of its config."""
    config = PredictConfig.model_validate({"enabled": True, **copy.deepcopy(dict(task.predict)), **changes})
    return lambda full: PredictiveStepper(full, config)


QUICK_JUMPS = {
    "warmup": 10,
    "min_full": 3,
    "horizons": [16, 64],
    "directions": ["optimizer"],
    "coefficients": "last",
    "confidence": 0,
    "guard": {"correction_interval": 4, "growth": 2, "relax": 2, "drift": 1.0, "credit": 1.0},
}

TASKS = {
    task.name: task
    for task in (
        Task("linear", "smooth", smooth.linear_data, smooth.line, smooth.Squares, None, 1000, 0.003,
             {"kind": "constant", "warmup": 0.02}, QUICK_JUMPS, lrs=(0.003, 0.01, 0.03, 0.1, 0.3)),
        Task("network", "smooth", smooth.digits_data, smooth.network, smooth.Classes, 100, 600, 3e-4,
             {"kind": "linear", "warmup": 0.02, "final": 0.0}, QUICK_JUMPS, lrs=(3e-4, 1e-3, 3e-3, 1e-2)),
        Task("cnn", "smooth", smooth.digits_data, smooth.cnn, smooth.Classes, 100, 600, 3e-4,
             {"kind": "linear", "warmup": 0.02, "final": 0.0}, QUICK_JUMPS, lrs=(3e-4, 1e-3, 3e-3, 1e-2)),
    )
}  # fmt: skip
