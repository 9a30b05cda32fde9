"""Tiny predictive runs through the real builder, and what they leave behind."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from scale.build import build_trainer
from scale.checkpoint.saved import Saved, latest_good
from scale.config import load_config
from scale.parallel.ranks import Ranks
from tests.conftest import metrics_of, tiny_run

STEPS = 40
LITTLE = {"members": 2, "hidden": 6, "latent": 2, "train_every": 2, "paths": 2, "bptt": 4}
"""A world model that costs little."""
OBSERVE = {
    "enabled": True, "mode": "observe", "warmup": 4, "min_full": 2, "horizons": [4, 8], "world": LITTLE,
    "directions": ["optimizer", "masked_slope"], "every": 2,
}  # fmt: skip
LAST = {
    "enabled": True, "warmup": 4, "min_full": 3, "horizons": [6, 12], "coefficients": "line", "confidence": 0,
    "directions": ["optimizer"], "world": LITTLE, "guard": {"correction_interval": 4, "settle_steps": 2, "growth": 2},
}  # fmt: skip
"""Jumps that happen and pay: the loss of a tiny model falls along a line for a while."""
WORLD = LAST | {
    "mode": "always",
    "coefficients": "world",
    "confidence": 0.001,
    "directions": ["optimizer", "masked_slope"],
}


def write(folder: Path, name: str, predict: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The config of a run of `STEPS` steps with dropout, every checkpoint of which stays."""
    content = tiny_run(
        folder,
        name=name,
        train={"steps": STEPS},
        optim={"lr": 3e-4},
        eval={"every": 20, "tokens": 512},
        checkpoint={"every": 1, "keep_last": 1000},
        **changes,
    )
    content["model"]["overrides"]["attention_dropout"] = 0.1
    if predict is not None:
        content["predict"] = predict
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def fit(path: Path, *overrides: str, allow: Sequence[str] = (), ranks: Ranks | None = None) -> Path:
    """Train to the end. Returns the run folder."""
    trainer = build_trainer(load_config(str(path), overrides), allow, ranks)
    assert trainer.fit() == "completed"
    return trainer.folder.path


def fit_all(ranks: Ranks, paths: Sequence[str], overrides: Sequence[str]) -> None:
    """For `run_ranks`: one run after the other."""
    for path in paths:
        fit(Path(path), *overrides, ranks=ranks)


def cut_back(run: Path, step: int, into: Path) -> Path:
    """A copy of a run that died after the checkpoint of `step`: later ones are gone, rows of later steps are not."""
    shutil.copytree(run, into / run.name)
    for path in (into / run.name / "checkpoints").iterdir():
        if path.name > f"step_{step:08d}":
            shutil.rmtree(path)
    return into / run.name


def last(run: Path) -> Saved:
    """The newest checkpoint."""
    saved = latest_good(run / "checkpoints", print)
    assert saved is not None
    return saved


def state(run: Path) -> dict[str, Any]:
    """The JSON state of the last checkpoint without what depends on the clock."""
    found = copy.deepcopy(last(run).state())
    found["stepper"].get("predict", {}).get("ledger", {}).pop("seconds", None)
    return found


def tensors(run: Path, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of the last checkpoint."""
    saved = last(run)
    out = {name: torch.empty(shape) for name, shape in saved.shapes().items() if name.startswith(prefix)}
    saved.read(out)
    return out


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Names and every bit, signs of zeros and NaN included."""
    return one.keys() == two.keys() and all(
        torch.equal(one[name].reshape(-1).view(torch.uint8), two[name].reshape(-1).view(torch.uint8)) for name in one
    )


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    return metrics_of(run)


def phases(run: Path) -> dict[int, str]:
    """The phase after each step, as its row says."""
    return {row["step"]: row["prediction"]["phase"] for row in rows(run)[1:]}


def assert_same_run(one: Path, two: Path) -> None:
    """Rows, JSON state and tensors."""
    assert rows(one) == rows(two)
    assert json.dumps(state(one), sort_keys=True) == json.dumps(state(two), sort_keys=True)
    assert same_bits(tensors(one), tensors(two))
