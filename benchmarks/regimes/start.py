"""How a run of a task is started: initial weights, order of the data and check data follow from the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.regimes import smooth
from scale.api import CheckpointConfig, OptimConfig, ScheduleConfig, Single, SpikeConfig, Trainer, build_trainer
from scale.config import PretrainRun
from scale.config.loader import validate
from scale.protocols import Stepper
from scale.train.step import BackwardStepper

RARELY: dict[str, Any] = {"every": 10, "world": {"train_every": 20}}
"""Statistics at every step pay only where steps are long (predict_overhead.py)."""
CACHE = Path.home() / ".cache" / "scale" / "benchmarks"
"""Tokenised text and the pretrained model that LoRA starts from."""


@dataclass(frozen=True)
class Settings:
    """What differs between runs of a task."""

    seed: int
    steps: int
    lr: float
    selection: str = "off"
    disaster: int | None = None
    """The batch (from 1) of a smooth task whose inputs are 10,000 times too large."""


class Maker(Protocol):
    """Makes the trainer of a run in a new folder."""

    def __call__(
        self, folder: Path, settings: Settings, around: Callable[[BackwardStepper], Stepper] | None
    ) -> Trainer: ...


MODELS = {
    "linear": (smooth.linear_data, smooth.line, smooth.Squares),
    "network": (smooth.digits_data, smooth.network, smooth.Classes),
    "cnn": (smooth.digits_data, smooth.cnn, smooth.Classes),
}


def smooth_trainer(name: str, batch: int | None) -> Maker:
    """Adam with a modest learning rate that falls to 0 (constant for the deterministic problem)."""
    data, model_of, objective = MODELS[name]
    kind = {"kind": "constant", "warmup": 0.02} if batch is None else {"kind": "linear", "warmup": 0.02, "final": 0.0}

    def make(folder: Path, settings: Settings, around: Any) -> Trainer:
        x, y, x_held, y_held = data(settings.seed)
        torch.manual_seed(settings.seed)
        return Trainer(
            model_of(),
            smooth.Shuffled(x, y, batch, settings.seed, settings.disaster),
            objective(),
            folder=folder / "run",
            steps=settings.steps,
            seed=settings.seed,
            optim=OptimConfig(lr=settings.lr, weight_decay=0.0, betas=(0.9, 0.99)),
            schedule=ScheduleConfig.model_validate(kind),
            spike=SpikeConfig(sigma=0),
            checkpoint=CheckpointConfig(every=10**9, keep_last=1, keep_best=0),
            strategy=Single("cpu"),
            judge=lambda root: smooth.HeldOut(root, x_held, y_held),
            eval_every=max(1, settings.steps // 10),
            layer_gradients=0,
            around=around,
        )

    return make


def text_config(folder: Path, settings: Settings, lora: bool) -> PretrainRun:
    """A decoder of 0.2M parameters on the sources of Python's standard library (or, with LoRA, on C++ headers)."""
    python = [{"kind": "python-stdlib"}]
    headers = [{"kind": "text", "path": str(Path(torch.__file__).parent / "include" / "torch" / "**" / "*.h")}]
    size = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": 16}  # fmt: skip
    content: dict[str, Any] = {
        "version": 1,
        "kind": "pretrain",
        "name": "run",
        "runs_dir": str(folder),
        "seed": settings.seed,
        "model": {"preset": "tiny", "overrides": size},
        "data": {
            "sources": headers if lora else python,
            "tokenizer": {"vocab_size": 512},
            "seq_len": 128,
            "held_out": {"fraction": 0.05},
            "cache": str(CACHE / "text"),
            "workers": 0,
        },
        "batch": {"sequences": 16},
        "train": {"steps": settings.steps},
        "optim": {"lr": settings.lr},
        "schedule": {"kind": "wsd", "warmup": 0.1, "decay": 0.1 if lora else 0.3, "final": 0.0},
        "eval": {"every": max(1, settings.steps // 10), "tokens": 32768},
        "checkpoint": {"every": 10**9, "keep_last": 1, "keep_best": 0},
        "monitor": {"progress": False, "layer_gradients": 0},
        # selection alone: jumps are what `around` brings
        "predict": RARELY
        | {
            "enabled": settings.selection != "off",
            "mode": "observe",
            "selection": {"kind": settings.selection, "warmup": 150},
        },
    }
    if lora:
        base = pretrained()
        content |= {"model": {"path": str(base)}, "adapter": {"kind": "lora", "rank": 8, "alpha": 16}}
        content["data"]["tokenizer"] = {"path": str(base)}
    return validate(content, {}, folder / "regime.yaml")


def pretrained() -> Path:
    """The model that LoRA starts from: trained once, on Python, and kept."""
    from scale.checkpoint.export import export
    from scale.load import load_run

    out = CACHE / "base"
    if not out.exists():
        config = text_config(CACHE / "runs", Settings(seed=12345, steps=800, lr=8e-3), lora=False)
        build_trainer(config).fit()
        export(*load_run(CACHE / "runs" / "run"), out)
    return out


def text_trainer(lora: bool = False) -> Maker:
    """AdamW with warm-up, a stable part and a decay to 0."""

    def make(folder: Path, settings: Settings, around: Any) -> Trainer:
        return build_trainer(text_config(folder, settings, lora), around=around)

    return make
