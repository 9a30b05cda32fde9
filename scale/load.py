"""Models back from disk: from a run's checkpoint, from a Hugging Face folder, from an exported adapter."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from scale.checkpoint.saved import Saved, latest_good, saved_in
from scale.config import PretrainRun, parse_config, stored_config
from scale.config.model import ModelConfig
from scale.data import tokenizer as tokenizers
from scale.data.files import one_line
from scale.errors import ScaleError, UsageError
from scale.hub import need
from scale.models.adapters import add_adapter
from scale.models.build import build_model
from scale.models.generation import SETTINGS, base_settings, read_settings
from scale.models.hf_config import is_model_folder, model_config
from scale.monitor.run_folder import RunFolder
from scale.sealed import broken_seal

"""Names, in a checkpoint, of predicted weights that were kept beside training."""
_ADAPTER = "adapter_config.json"


@dataclass
class Trained:
    """What a run has made, and what it was made from."""

    model: Any
    """fp32, on the CPU, in evaluation mode; a PeftModel if the run trained an adapter."""
    tokenizer: Any | None
    """None if the run was trained on bare token ids."""
    dtype: torch.dtype
    """In which the base model was stored; fp32 for weights that were made at random."""
    generation: dict[str, Any]
    """Generation settings of the base model; empty if there are none."""
    base: str | None
    """Folder or name of the base model; None for weights that were made at random."""


def load_run(folder: str | Path, step: int | None = None, best: bool = False) -> tuple[Any, Any]:
    """Model (CPU, eval mode) and tokenizer (None if there is none) of a run's newest good checkpoint, or the one at `step`,
    or the `best` by held-out loss.

    Raises UsageError if the folder is no run or has no such checkpoint, DamagedCheckpoint if that one is damaged.
    """
    trained = load_trained(folder, step, best)
    return trained.model, trained.tokenizer


def load_trained(folder: str | Path, step: int | None = None, best: bool = False) -> Trained:
    """As `load_run`, with what an export needs to know of the base model."""
    run = RunFolder(Path(folder))
    if not is_run_folder(run):
        raise UsageError(f"{folder}: not a run folder (it has no config.yaml)")
    saved = _find(run, step, best)
    config = config_of(run, saved)
    if not is_model_folder(run.model):
        raise UsageError(f"{run.model}: holds no config.json; run `scale train` on this run again, which writes it")
    if damage := broken_seal(run.model):
        raise UsageError(f"{damage}; run `scale train` on this run again, which writes the folder anew")
    hf_config = AutoConfig.from_pretrained(run.model, trust_remote_code=False)
    pretrained = config.model.path is not None and config.model.init != "random"
    if config.adapter is not None and config.model.path is not None:
        need({"model.path": config.model.path})
    stored = getattr(torch, str(hf_config.dtype).removeprefix("torch."), None) if pretrained else None
    if config.adapter is None:
        model: Any = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    else:
        base, _ = build_model(config.model, hf_config, "sdpa", config.seed)
        model = add_adapter(base, config.adapter, config.seed)
    _fill(model, saved, run)
    settings = run.model / SETTINGS
    generation = read_settings(settings) if settings.exists() else base_settings(config.model)
    if generation:
        model.generation_config = GenerationConfig.from_dict(generation)
    return Trained(
        model.eval(),
        tokenizers.load(str(run.model)) if (run.model / "tokenizer.json").exists() else None,
        stored if isinstance(stored, torch.dtype) else torch.float32,
        generation,
        config.model.path if pretrained else None,
    )


def _fill(model: Any, saved: Saved, run: RunFolder) -> None:
    ours = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    trained = [name for name in saved.shapes() if name.startswith("model/")]
    for name in trained:
        if name not in ours:
            raise ScaleError(
                f"{saved.path}: holds {name.removeprefix('model/')}, which the model of {run.model} has not"
            )
    saved.read({name: ours[name] for name in trained})


def is_run_folder(run: RunFolder) -> bool:
    """Whether a run was trained here; config.yaml may have been lost since."""
    return run.config.exists() or run.checkpoints.is_dir()


def config_of(run: RunFolder, saved: Saved) -> PretrainRun:
    """The config that a checkpoint was trained with: its own record, or config.yaml beside checkpoints of older versions.
    Raises UsageError, DamagedCheckpoint."""
    record = saved.record()
    return parse_config(record["config"], saved.path) if "config" in record else stored_config(run.config)


def _find(run: RunFolder, step: int | None, best: bool) -> Saved:
    found = saved_in(run.checkpoints)
    if best:
        return _best(run, found)
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


def _best(run: RunFolder, found: list[Saved]) -> Saved:
    """The checkpoint of the lowest held-out loss; of equal ones the latest."""
    for saved in found:
        if saved.val_loss is None:
            saved.verify()  # the loss of a damaged one cannot be read: it may have been the best
    scored = [(saved.val_loss, -saved.step, saved) for saved in found if saved.val_loss is not None]
    if not scored:
        have = ", ".join(str(s.step) for s in found) or "none"
        raise UsageError(
            f"--best: no checkpoint in {run.checkpoints} has a held-out loss (there are: {have}; checkpoint.every "
            "and eval.every should meet, and data.held_out.fraction be above 0)"
        )
    saved = min(scored)[2]
    saved.verify()
    return saved


def load_model(path: str | Path, step: int | None = None, best: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer (None if there is none) of a run folder, a Hugging Face folder or an exported adapter."""
    folder = Path(path)
    if is_run_folder(RunFolder(folder)):
        return load_run(path, step, best=best)
    adapter = (folder / _ADAPTER).is_file()
    if not is_model_folder(path) and not adapter:
        raise UsageError(
            f"{path}: neither a run folder (config.yaml) nor a model folder (config.json) nor an adapter ({_ADAPTER})"
        )
    if step is not None or best:
        option, kind = "--best" if best else f"--step {step}", "an adapter" if adapter else "a model folder"
        raise UsageError(f"{option}: {path} is {kind}, which has no steps (leave it out)")
    if adapter:
        return _load_adapter(folder)
    config = ModelConfig(path=str(path))
    model, _ = build_model(config, model_config(config), "sdpa", seed=0)
    return model.eval(), _tokenizer_in(folder)


def _load_adapter(folder: Path) -> tuple[Any, Any]:
    """A peft adapter on its base model."""
    from peft import PeftModel

    try:
        base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UsageError(f"{folder / _ADAPTER}: names no base model (base_model_name_or_path)")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UsageError(f"{folder}: holds no adapter_model.safetensors (others may run code when opened)")
    try:
        config = ModelConfig(path=base)
        model, _ = build_model(config, model_config(config), "sdpa", seed=0)
    except UsageError as error:
        raise UsageError(f"{folder}: its base model cannot be loaded: {error}") from None
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # peft and torch raise of every kind
        raise UsageError(f"{folder}: the adapter does not fit {base} ({one_line(error)})") from None
    if (folder / SETTINGS).is_file():
        adapted.generation_config = GenerationConfig.from_dict(read_settings(folder / SETTINGS))
    tokenizer = _tokenizer_in(folder)
    return adapted.eval(), _tokenizer_in(Path(base)) if tokenizer is None else tokenizer


def _tokenizer_in(folder: Path) -> Any | None:
    named = not folder.is_dir() or any(folder.glob("tokenizer*.json"))
    return tokenizers.load(str(folder)) if named else None
