"""Models back from disk: from a run's checkpoint or from a Hugging Face folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scale.checkpoint.saved import Saved, latest_good, saved_in
from scale.config import load_config
from scale.config.model import ModelConfig
from scale.data import tokenizer as tokenizers
from scale.errors import ScaleError, UsageError
from scale.models.adapters import add_adapter
from scale.models.build import build_model, is_model_folder, model_config
from scale.monitor.run_folder import RunFolder

SHADOW = "predict/shadow.weights/"
"""Names, in a checkpoint, of predicted weights that were kept beside training."""


def load_run(folder: str | Path, step: int | None = None, shadow: bool = False) -> tuple[Any, Any]:
    """Model (CPU, eval mode) and tokenizer (None if there is none) of a run's newest good checkpoint, or the one at `step`.

    `shadow`: with the best predicted weights (predict.use = 'shadow') in place of the trained ones. Raises UsageError if
    the folder is no run or has no such checkpoint or shadow, DamagedCheckpoint if that one is damaged.
    """
    run = RunFolder(Path(folder))
    if not run.config.exists():
        raise UsageError(f"{folder}: not a run folder (it has no config.yaml)")
    config = load_config(run.config)
    saved = _find(run, step)
    if not is_model_folder(run.model):
        raise UsageError(f"{run.model}: holds no config.json; run `scale train` on this run again, which writes it")
    hf_config = AutoConfig.from_pretrained(run.model, trust_remote_code=False)
    if config.adapter is None:
        model: Any = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    else:
        base, _ = build_model(config.model, hf_config, "sdpa", config.seed)
        model = add_adapter(base, config.adapter, config.seed)
    ours = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    trained = [name for name in saved.shapes() if name.startswith("model/")]
    for name in trained:
        if name not in ours:
            raise ScaleError(
                f"{saved.path}: holds {name.removeprefix('model/')}, which the model of {run.model} has not"
            )
    saved.read({name: ours[name] for name in trained})
    if shadow:
        predicted = [name for name in saved.shapes() if name.startswith(SHADOW)]
        if not predicted:
            raise UsageError(
                f"--shadow: {saved.path} holds no predicted weights (a run with predict.use = 'shadow' keeps them, once a "
                "jump has lowered the check loss)"
            )
        saved.read({name: ours[f"model/{name.removeprefix(SHADOW)}"] for name in predicted})
    tokenizer = tokenizers.load(str(run.model)) if (run.model / "tokenizer.json").exists() else None
    return model.eval(), tokenizer


def _find(run: RunFolder, step: int | None) -> Saved:
    found = saved_in(run.checkpoints)
    if step is None:
        saved = latest_good(run.checkpoints, lambda text: print(text, file=sys.stderr))
    else:
        saved = next((s for s in found if s.step == step), None)
    if saved is None:
        have = ", ".join(str(s.step) for s in found) or "none"
        raise UsageError(
            f"{run.checkpoints}: no checkpoint{'' if step is None else f' of step {step}'} (there are: {have})"
        )
    if step is not None:
        saved.verify()
    return saved


def load_model(path: str | Path, step: int | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a run folder or of a Hugging Face folder."""
    if RunFolder(Path(path)).config.exists():
        return load_run(path, step)
    if not is_model_folder(path):
        raise UsageError(f"{path}: neither a run folder (config.yaml) nor a model folder (config.json)")
    if step is not None:
        raise UsageError(f"--step {step}: {path} is a model folder, which has no steps (leave it out)")
    config = ModelConfig(path=str(path))
    model, _ = build_model(config, model_config(config), "sdpa", seed=0)
    return model.eval(), tokenizers.load(str(path))
