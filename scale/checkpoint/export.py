"""A Hugging Face folder from a run: config, safetensors, tokenizer. Written aside, proven, then renamed into place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from scale.checkpoint.export_proof import compare, look
from scale.checkpoint.export_tokenizer import save_tokenizer
from scale.data.files import one_line
from scale.data.tokenizer import start_id, vocabulary_size
from scale.errors import ScaleError, UsageError
from scale.files import new_folder
from scale.models.adapters import merge_adapter
from scale.models.generation import SETTINGS, ends, settings_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    model: Any,
    tokenizer: Any | None,
    out: Path,
    merge: bool = False,
    dtype: torch.dtype = torch.float32,
    generation: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> Path:
    """Write a model that `from_pretrained` loads. `merge` folds LoRA adapters into the base weights first.

    `model` is fp32 and on the CPU; it is used up: merged, rounded to `dtype` and emptied on the way, so that one copy of
    the weights is in memory at any time. `generation`: the base model's settings; `base`: its name or folder, None for
    weights that were made at random. Before the folder is put in place it is loaded again; logits and greedy generation
    must be those of the model, up to rounding. Raises ScaleError if they are not, and nothing is left.
    """
    check_free(out)
    adapter = hasattr(model, "peft_config")
    if merge and not adapter:
        raise UsageError("--merge: this run has no adapter to merge")
    if adapter and not merge and base is None:
        raise UsageError(
            "the base weights of this run were made at random and are in no folder: export it with --merge"
        )
    try:
        with new_folder(out) as aside:
            _write(model, tokenizer, aside, merge, dtype, dict(generation or {}), base)
    except ScaleError:
        raise
    except Exception as error:  # of transformers, peft, safetensors: of every kind
        raise ScaleError(f"{out}: {type(error).__name__}: {one_line(error)}; nothing was written") from error
    return out


def check_free(out: Path) -> None:
    """Raise UsageError if something is in the way, before any work is done."""
    if os.path.lexists(out):
        raise UsageError(f"--out = {str(out)!r}: exists already (choose another folder or remove it)")


def _write(
    model: Any,
    tokenizer: Any | None,
    aside: Path,
    merge: bool,
    dtype: torch.dtype,
    generation: dict[str, Any],
    base: str | None,
) -> None:
    if base is not None and not generation:  # the tokens of older models are in config.json alone
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {name: getattr(model.config, name) for name in names if getattr(model.config, name) is not None}
    if tokenizer is not None:
        generation = settings_for(tokenizer, generation)
        _name_tokens(model.config, tokenizer, base is not None)
        save_tokenizer(tokenizer, aside)
    model.generation_config = GenerationConfig.from_dict(generation)
    expected = look(model)
    if merge:
        model = merge_adapter(model)
        model.generation_config = GenerationConfig.from_dict(generation)
        compare(expected, look(model), "merging the adapter into the base weights")
    adapter = hasattr(model, "peft_config")
    if dtype != torch.float32:
        _round(model, dtype, adapter)
        for tensor in _stored(model, adapter):
            tensor.data = tensor.data.float()
        expected = look(model)
        _round(model, dtype, adapter)
    if adapter:
        _save_adapter(model, aside, str(base))
    else:
        model.generation_config = GenerationConfig()  # of the settings it would refuse some: they are written below
        model.save_pretrained(aside)
    if tokenizer is not None or generation:
        (aside / SETTINGS).write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    model.to("meta")
    compare(expected, look(_loaded(aside, adapter)), "the export, loaded again")


def _loaded(aside: Path, adapter: bool) -> Any:
    """As others load it, in fp32."""
    if not adapter:
        return AutoModelForCausalLM.from_pretrained(aside, dtype=torch.float32, trust_remote_code=False)
    from peft import AutoPeftModelForCausalLM

    model: Any = AutoPeftModelForCausalLM.from_pretrained(aside, dtype=torch.float32)
    if (aside / SETTINGS).exists():  # peft knows only those of the base model
        model.generation_config = GenerationConfig.from_pretrained(aside)
    return model


def _save_adapter(model: Any, aside: Path, base: str) -> None:
    """The trained weights alone, with a base that is found from any working folder."""
    (config,) = model.peft_config.values()
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    model.save_pretrained(aside, save_embedding_layers=False)


def _stored(model: nn.Module, adapter: bool) -> Iterator[Tensor]:
    """Parameters and buffers that are written, those with a fraction."""
    transient = {name for prefix, part in model.named_modules() for name in _transient(prefix, part)}
    tensors: list[Tensor] = [param for param in model.parameters() if param.requires_grad or not adapter]
    if not adapter:
        tensors += [buffer for name, buffer in model.named_buffers() if name not in transient]
    return (tensor for tensor in tensors if tensor.is_floating_point())


def _transient(prefix: str, part: nn.Module) -> list[str]:
    return [f"{prefix}.{name}".lstrip(".") for name in part._non_persistent_buffers_set]


def _round(model: nn.Module, dtype: torch.dtype, adapter: bool) -> None:
    for tensor in _stored(model, adapter):
        rounded = tensor.data.to(dtype)
        if not torch.equal(rounded.isfinite(), tensor.data.isfinite()):
            raise UsageError(
                f"--dtype: a weight of {tensor.data.abs().max():.3g} is beyond the range of {dtype} (use bf16)"
            )
        tensor.data = rounded


def _name_tokens(config: Any, tokenizer: Any, pretrained: bool) -> None:
    """The tokens of config.json are those of the documents that the model was trained on."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.bos_token_id = start_id(tokenizer)
        part.eos_token_id = ends(tokenizer, part.eos_token_id)
        part.pad_token_id = _pad(part, tokenizer, pretrained)


def _pad(config: Any, tokenizer: Any, pretrained: bool) -> int | None:
    """An id that no document holds: families make the embedding of config.json's pad token one that is never trained.

    The one of the base model or of the tokenizer; else a row of the embedding beyond the tokenizer's vocabulary.
    """
    if pretrained and config.pad_token_id is None:
        return None
    candidates = [config.pad_token_id] if pretrained else []
    for pad in (*candidates, tokenizer.pad_token_id, vocabulary_size(tokenizer)):
        if (
            pad is not None
            and 0 <= pad < config.vocab_size
            and pad not in (start_id(tokenizer), tokenizer.eos_token_id)
        ):
            return int(pad)
    return None
