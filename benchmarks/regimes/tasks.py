"""The tasks of the regime table: what is trained, for how long, and with which predictor."""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.regimes.start import RARELY, Maker, Settings, smooth_trainer, text_trainer
from scale.config.predict import PredictConfig
from scale.monitor.records import read_rows
from scale.predict.features import FeatureEncoder
from scale.predict.moments import ComingStep, Statistics
from scale.predict.signals import Signals
from scale.predict.stepper import PredictiveStepper
from scale.protocols import Stepper
from scale.train.step import BackwardStepper

Around = Callable[[BackwardStepper], Stepper]


@dataclass(frozen=True)
class Task:
    """One row of the table. `steps` was fixed beforehand, where the full run still falls by 1% or more per tenth of its
    steps; `lrs` are what the control at the shorter horizon may choose from."""

    name: str
    regime: str
    start: Maker
    steps: int
    lr: float
    lrs: tuple[float, ...]
    predict: Mapping[str, Any]
    goal: float
    """Share of backward passes to be saved."""
    shorter: int | None = None
    """Steps of the predictive run's own schedule, where selection lets it be shorter than the full run's."""
    selection: str = "off"
    margin: float = 0.001
    """Relative change of the held-out loss that counts as not worse."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. Passes in optimizer steps' worth of batches; `seconds` of training and evaluation; `active`: share
    of steps that were predicted or made on chosen documents; `curve`: (step, held-out loss)."""

    loss: float
    backward: int
    forward: int
    seconds: float
    active: float
    curve: list[list[float]]
    ledger: dict[str, Any] | None
    drift: float | None = None
    """Mean over jumps of |steps saved - length| / length."""

    @property
    def flops(self) -> float:
        """In full steps: a forward is a third of one."""
        return (self.forward + 2 * self.backward) / 3


def run(task: Task, settings: Settings, around: Around | None = None) -> Outcome:
    """Train from the start, in a folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="scale-regime-"))
    try:
        trainer = task.start(folder, settings, around)
        start = time.perf_counter()
        if (ended := trainer.fit()) != "completed":
            raise SystemExit(f"{task.name}: {ended} before its end; nothing is kept of it")
        return outcome_of(trainer.folder.path, time.perf_counter() - start)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def outcome_of(folder: Path, seconds: float) -> Outcome:
    """What the rows of a finished run say."""
    rows = read_rows(folder / "metrics.jsonl")
    last = rows[-1]
    steps_passes = max(1, last["backward_passes"] // max(1, sum(row["phase"] in ("full", "correct") for row in rows)))
    return Outcome(
        loss=last["val_loss"],
        backward=last["backward_passes"] // steps_passes,
        forward=last["forward_passes"] // steps_passes,
        seconds=seconds,
        active=sum(row["was_predicted"] or chosen(row) for row in rows) / last["step"],
        curve=[[row["step"], row["val_loss"]] for row in rows if row["val_loss"] is not None],
        ledger=last["ledger"],
        drift=drift_of(rows),
    )


def chosen(row: Mapping[str, Any]) -> bool:
    """By the time of this row, selection had left documents out."""
    return bool(row["ledger"] and row["ledger"]["tokens_skipped"])


def drift_of(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over jumps of |steps saved - length| / length."""
    said = [row["prediction"] for row in rows if row["prediction"]]
    lengths = [one["kept"] for one in said if one.get("kept")]
    saved = [one["steps_saved"] for one in said if one.get("steps_saved") is not None]
    off = [abs(steps - length) / length for steps, length in zip(saved, lengths, strict=False)]
    return sum(off) / len(off) if off else None


def predictor(task: Task, **changes: Any) -> dict[str, Any]:
    """The predictor's config for a task; `changes` replace its entries, those of `guard` one by one."""
    config = copy.deepcopy(dict(task.predict))
    guard = config.get("guard", {}) | changes.pop("guard", {})
    return {"enabled": True} | config | changes | {"guard": guard}


class Shuffled(FeatureEncoder):
    """The features of each step in an order of their own: whatever the world model could read from them is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def features(self, signals: Signals, coming: ComingStep, statistics: Statistics | None) -> list[float]:
        return [float(x) for x in self.rng.permutation(super().features(signals, coming, statistics))]


def predictive(config: Mapping[str, Any], shuffled: bool = False) -> Around:
    """The predictive stepper of a config."""
    checked = PredictConfig.model_validate(dict(config))

    def around(full: BackwardStepper) -> PredictiveStepper:
        stepper = PredictiveStepper(full, checked)
        if shuffled:
            stepper.controller.encoder = Shuffled()
        return stepper

    return around


def as_row(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome)


EAGER: dict[str, Any] = {
    "warmup": 10,
    "min_full": 1,
    "horizons": [16],
    "directions": ["optimizer"],
    "coefficients": "line",
    "confidence": 0,
    "guard": {"correction_interval": 4, "growth": 2, "settle_steps": 1, "drift": 1.0, "discount": 0.9},
}
"""Short cycles along the last update: on smooth problems it is as good as an average over many. Horizon and discount of each
task were chosen on seeds 100 to 102, which are not scored."""
PATIENT: dict[str, Any] = {
    "warmup": 40,
    "min_full": 3,
    "horizons": [8, 16],
    "directions": ["optimizer"],
    "coefficients": "line",
    "confidence": 0,
    "guard": {"correction_interval": 4, "growth": 2, "settle_steps": 2, "drift": 1.0, "discount": 1.0},
}
"""The same for noisy problems, where the first jumps must wait until the fast directions have settled. Chosen on seeds 100
and 101, as all else that differs between tasks."""
ADAPTER = PATIENT | {"min_full": 1, "horizons": [16], "guard": {**PATIENT["guard"], "tolerance": 0.01}}
DIGITS = EAGER | {"horizons": [16], "guard": {**EAGER["guard"], "discount": 0.95}}
REPEATING = PATIENT | {
    "mode": "always",
    "min_full": 1,
    "extrapolation_ratio": 3,
    "extrapolation_steps": 32,
    "world": RARELY["world"],
    "guard": {"correction_interval": 32, "tolerance": 0.05, "settle_steps": 3, "drift": 50.0, "discount": 0.28},
}
"""Where single jumps cannot be told from noise: nearly every update is repeated thrice, of which 0.84 steps are counted."""
DEFAULT = {"preset": "balanced"} | RARELY
"""What a user gets without a word, but for `RARELY`."""

SEEDS = {"smooth": 6, "text": 6, "low": 3, "lora": 3}
"""Paired seeds of the full and the predictive run at most: what a CPU gets through in hours, not what the margin would take."""
OTHERS = {"smooth": 6, "text": 3, "low": 3, "lora": 3}
"""The same of ablations and controls."""
NET_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TEXT_LRS = (3e-3, 6e-3, 1.2e-2)
LOW_LRS = (1.2e-3, *TEXT_LRS)

TASKS = {
    task.name: task
    for task in (
        Task("linear", "smooth", smooth_trainer("linear", None), 1000, 0.003, (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), EAGER, 0.78),
        Task("network", "smooth", smooth_trainer("network", 100), 600, 3e-4, NET_LRS, EAGER | {"horizons": [12]}, 0.78),
        Task("cnn", "smooth", smooth_trainer("cnn", 100), 600, 3e-4, NET_LRS, DIGITS, 0.78),
        Task("text, tuned lr", "text", text_trainer(), 1200, 6e-3, TEXT_LRS, DEFAULT, 0.15, 1020, "regression"),
        Task("text, lr 5x too small", "low", text_trainer(), 1200, 1.2e-3, LOW_LRS, REPEATING, 0.4, None, "regression"),
        Task("LoRA, recipe lr", "lora", text_trainer(lora=True), 200, 2e-4, (2e-4, 1e-3, 3e-3, 1e-2, 3e-2), ADAPTER, 0.6),
        Task("LoRA, tuned lr", "lora", text_trainer(lora=True), 200, 1e-2, (3e-3, 1e-2, 3e-2), DEFAULT, 0.6),
    )
}  # fmt: skip
