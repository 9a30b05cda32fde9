"""From `model:` to a Hugging Face config. Everything that is wrong with it is told in one line, with field, value and place."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from scale.config.model import ModelConfig
from scale.errors import UsageError
from scale.models.fields import Place, check_fields, check_ignored, misfit, reason
from scale.models.presets import PRESETS, preset_config
from scale.models.weight_files import check_files

Made = TypeVar("Made")
_PARTS = ("text", "vision", "audio", "image", "vq", "thinker")
"""Beginnings of the names of sub-configs that make a model one of several kinds of data."""

_OTHER_POSITIONS = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Model types whose positions count from pad_token_id + 1 where nobody gives them; here each document's count from 0."""


def model_config(config: ModelConfig, vocab_size: int | None = None) -> PretrainedConfig:
    """The Hugging Face config that `model:` describes. Raises UsageError for a path that cannot be read, and for fields that
    are unknown, wrong, or would be ignored."""
    place = place_of(config)
    if config.preset is not None:
        preset = config.preset
        check_fields({**PRESETS[preset], **config.overrides}, place)
        built = checked(lambda: preset_config(preset, vocab_size, config.overrides), config)
    else:
        path = config.path
        assert path is not None
        _check_path(path, config.init != "random", place)
        built = checked(lambda: AutoConfig.from_pretrained(path, trust_remote_code=False), config)
        _check_kind(built, path, config.init != "random")
    unknown = [key for key in config.overrides if key not in type(built)().to_dict()]
    if unknown:
        raise UsageError(f"model.overrides.{unknown[0]}: {type(built).__name__} has no such field")
    check_fields(config.overrides, place)
    if config.path is not None and config.overrides:  # only fields of the class: never options of from_pretrained
        built = checked(lambda: type(built).from_dict({**built.to_dict(), **config.overrides}), config)
    check_fields(built.to_dict(), place)
    check_ignored(built, config.overrides, place)
    return built


def place_of(config: ModelConfig) -> Place:
    """How to name the place of a field."""

    def place(key: str) -> str:
        if key in config.overrides:
            return f"model.overrides.{key}"
        if config.path is None:
            return f"model.preset = {config.preset!r}: {key}"
        return f"{Path(config.path) / 'config.json'}: {key}"

    return place


def checked(make: Callable[[], Made], config: ModelConfig, hf_config: PretrainedConfig | None = None) -> Made:
    """What `make` makes. Raises UsageError with one line for whatever it raises: transformers and its validators raise of
    every kind. `hf_config`: the config to look for the reason in, where there is one already."""
    try:
        return make()
    except UsageError:
        raise
    except Exception as error:
        place = place_of(config)
        fields = hf_config.to_dict() if hf_config is not None else _given(config)
        found = misfit(fields, place) or reason(error, fields, place)
        if found is not None:
            raise UsageError(found) from None
        what = f"model.path = {config.path!r}" if config.path else f"model.overrides = {config.overrides}"
        if isinstance(error, OSError) and config.path and not Path(config.path).exists():
            what += f": no such folder here (working folder {Path.cwd()}), and no model that could be loaded from Hugging Face"
        if "can't allocate memory" in str(error):
            raise UsageError(f"{what}: the model does not fit into memory (use a smaller one)") from None
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        raise UsageError(f"{what}: {kind}{textwrap.shorten(text, 300, placeholder=' ...')}") from None


def _given(config: ModelConfig) -> dict[str, Any]:
    """Fields as they were written, without defaults."""
    if config.preset is not None:
        return {**PRESETS[config.preset], **config.overrides}
    file = Path(config.path or "", "config.json")
    return {**(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}), **config.overrides}


def is_model_folder(path: str | Path) -> bool:
    """Whether a path holds a Hugging Face model."""
    return (Path(path) / "config.json").is_file()


def _check_path(path: str, with_weights: bool, place: Place) -> None:
    """Plain words for what transformers calls a bad repository name or an unknown architecture. Raises UsageError."""
    folder = Path(path)
    if path.startswith(("/", ".", "~")) and not folder.exists():
        raise UsageError(f"model.path = {path!r}: no such folder (working folder {Path.cwd()})")
    if not folder.exists():
        return  # a repository's name
    if not folder.is_dir():
        raise UsageError(
            f"model.path = {path!r}: is a file (give the folder that save_pretrained or `scale export` wrote)"
        )
    if not is_model_folder(folder):
        hint = "give a folder that save_pretrained or `scale export` wrote"
        if (folder / "config.yaml").is_file():
            hint = f"it is a run folder: `scale export {path} --out FOLDER`, and give that FOLDER"
        elif (folder / "adapter_config.json").is_file():
            hint = "it is an adapter: give the folder of its base model, or export the adapter with --merge"
        raise UsageError(f"model.path = {path!r}: the folder holds no config.json ({hint})")
    check_fields(_fields_of(folder / "config.json"), place)
    if with_weights and not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"model.path = {path!r}: holds no .safetensors file; others (pytorch_model.bin) may run code when opened and "
            "are not read: save the model again with save_pretrained"
        )
    if with_weights:
        check_files(folder)


def _fields_of(file: Path) -> dict[str, Any]:
    """What a config.json says. Raises UsageError for what transformers could not make a config of."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 (byte {error.start}): save the model again") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{file}:{error.lineno}: not valid JSON ({error.msg}): save the model again") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file}: expected a JSON object of fields, found {type(content).__name__}")
    kind = content.get("model_type")
    if kind is None:
        raise UsageError(f"{file}: has no model_type (such as 'llama'), so that nobody knows what the weights are")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = get_close_matches(str(kind), list(CONFIG_MAPPING), 1)
        hint = f"did you mean {near[0]!r}?" if near else "a newer transformers may know it"
        if "auto_map" in content:
            hint = "its own code, named in auto_map, is never run"
        raise UsageError(
            f"{file}: model_type = {kind!r}: not known to transformers {transformers.__version__} ({hint})"
        )
    return content


def _check_kind(built: PretrainedConfig, path: str, with_weights: bool) -> None:
    """Raises UsageError for models that are no causal language models of text alone, and for quantised weights."""
    parts = [key for key in built.sub_configs if key.startswith(_PARTS)]
    if parts:
        raise UsageError(
            f"model.path = {path!r}: model_type = {built.model_type!r} is a model of several parts ({', '.join(parts)}); only "
            "models of text are trained (save its language model alone, with its text_config as config.json, and give that "
            "folder)"
        )
    if AutoModelForCausalLM._model_mapping.get(type(built), None) is None:
        raise UsageError(
            f"model.path = {path!r}: model_type = {built.model_type!r}: transformers has no causal language model of this type"
        )
    if built.model_type in _OTHER_POSITIONS:
        raise UsageError(
            f"model.path = {path!r}: model_type = {built.model_type!r}: its positions begin after pad_token_id, "
            "those of packed documents at 0 (choose a model of another type)"
        )
    quantised: Any = getattr(built, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        fix = "load it dequantised with transformers, save that with save_pretrained, and give that folder"
        if not with_weights:
            fix = "remove quantization_config from its config.json"
        raise UsageError(
            f"model.path = {path!r}: quantization_config.quant_method = {method!r}: quantised weights are not trained ({fix})"
        )
