"""A Hugging Face folder from a run: config, safetensors, tokenizer. Written aside, then renamed into place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scale.data.tokenizer import start_id
from scale.errors import UsageError
from scale.files import new_folder


def export(model: Any, tokenizer: Any | None, out: Path, merge: bool = False) -> Path:
    """Save a model that `from_pretrained` loads. `merge` folds LoRA adapters into the base weights first."""
    check_free(out)
    if hasattr(model, "merge_and_unload") and merge:
        model = model.merge_and_unload()
    elif merge:
        raise UsageError("--merge: this run has no adapter to merge")
    with new_folder(out) as aside:
        if tokenizer is not None:
            _name_special_tokens(model, tokenizer)
            tokenizer.save_pretrained(aside)
        model.save_pretrained(aside)
    return out


def check_free(out: Path) -> None:
    """Raise UsageError if something is in the way, before any work is done."""
    if out.exists():
        raise UsageError(f"--out = {str(out)!r}: exists already (choose another folder or remove it)")


def _name_special_tokens(model: Any, tokenizer: Any) -> None:
    """Let `generate` of the exported model end documents without being told how."""
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and config.eos_token_id is None:
            config.bos_token_id, config.eos_token_id = start_id(tokenizer), tokenizer.eos_token_id
            config.pad_token_id = tokenizer.eos_token_id
