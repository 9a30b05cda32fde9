"""DeepSpeed's JSON: generated from the run's YAML; a file of the user's own is checked against it and merged in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scale.config.run import DeepSpeedConfig
from scale.errors import UsageError

Json = dict[str, Any]

PLACES = {
    "zero_optimization.stage": "compute.deepspeed.stage",
    "zero_optimization.offload_optimizer.device": "compute.deepspeed.offload",
    "bf16.enabled": "compute.precision",
    "fp16.enabled": "compute.precision",
    "gradient_clipping": "optim.clip",
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch",
    "optimizer": "optim",
    "scheduler": "schedule",
}
"""Keys of DeepSpeed that this project decides by its own, and where."""
PASSED = {
    "zero_optimization", "bf16", "fp16", "data_types", "communication_data_type", "comms_logger", "flops_profiler",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "log_level",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip
"""Sections of a user's file that are handed to DeepSpeed. It ignores unknown ones, so they are refused here."""
FREE = {"communication_data_type", "steps_per_print", "log_level", "zero_optimization.memory_efficient_linear"}
"""Defaults of this project that a user's file may change."""
REFUSED = {
    "zero_optimization.offload_param": "weights stay on the device; masters and moments follow compute.deepspeed.offload",
    "zero_optimization.offload_optimizer.ratio": "it needs DeepSpeed's own optimizer",
    "zero_optimization.offload_optimizer.super_offload": "it needs DeepSpeed's own optimizer",
    "zero_optimization.zenflow": "it steps on its own schedule",
    "zero_optimization.cpu_offload": "compute.deepspeed.offload decides",
    "bf16.bf16_master_weights_and_grads": "masters are fp32",
    "bf16.bf16_optimizer_states": "moments are fp32",
}
"""Keys inside passed sections that would break what the strategy promises: only unset or off."""


def deepspeed_json(config: DeepSpeedConfig, precision: str) -> Json:
    """The configuration for `deepspeed.initialize`. Raises UsageError for a broken or contradicting `config.config`.

    The loop accumulates and the strategy clips, so batch sizes and clipping are neutral here.
    """
    ours: Json = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # gradients are summed over ranks unrounded
        "zero_optimization": {
            "stage": config.stage,
            "offload_optimizer": {"device": "cpu" if config.offload else "none"},
            "memory_efficient_linear": False,  # would replace torch.nn.functional.linear for the whole process
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "log_level": "error",
    }
    if config.config is None:
        return ours
    theirs = _read(config.config)
    _check(theirs, ours, config.config)
    return _merged(ours, theirs)


def _read(path: str) -> Json:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"compute.deepspeed.config = {path!r}: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a JSON object with DeepSpeed's sections, found {type(value).__name__}")
    return value


def _check(theirs: Json, ours: Json, path: str) -> None:
    """Raises UsageError for the first key that says something else than this run's YAML."""
    decided = dict(_leaves(ours))
    sections = {key.rpartition(".")[0] for key in decided} - {""}
    for key, value in _leaves(theirs, stop=PLACES.keys() | REFUSED.keys()):
        if value == "auto" and (key in decided or key in PLACES):
            continue  # the Hugging Face Trainer's word for "not decided here"
        if key in sections:
            raise UsageError(f"{path}: {key} = {_short(value)}: expected a JSON object. Correct it or remove the key")
        if key in REFUSED and _is_set(value):
            raise UsageError(f"{path}: {key} = {json.dumps(value)} is not supported: {REFUSED[key]}. Remove the key")
        if key in decided and key not in FREE and value != decided[key]:
            raise UsageError(_contradiction(path, key, value, decided[key]))
        if key in PLACES and key not in decided:
            raise UsageError(f"{path}: {key} = {_short(value)}, but {PLACES[key]} of the run decides. Remove the key")
        if key not in decided and key.partition(".")[0] not in PASSED:
            raise UsageError(f"{path}: {key} = {_short(value)} is not supported. Remove the key")


def _contradiction(path: str, key: str, value: Any, own: Any) -> str:
    place = PLACES.get(key)
    fix = f"Remove the key and set {place}" if place else "Remove the key"
    return f"{path}: {key} = {_short(value)}, but this run has {json.dumps(own)}. {fix}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_set(value: Any) -> bool:
    """Whether a section does anything: {"device": "none"} and false do not."""
    if isinstance(value, dict):
        return value.get("device", "on") != "none" and bool(value)
    return bool(value)


def _leaves(value: Json, prefix: str = "", stop: Any = ()) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; keys in `stop` are not entered."""
    for name, inner in value.items():
        key = prefix + name
        if isinstance(inner, dict) and key not in stop:
            yield from _leaves(inner, key + ".", stop)
        else:
            yield key, inner


def _merged(ours: Json, theirs: Json) -> Json:
    out = dict(ours)
    for key, value in theirs.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = _merged(out[key], value)
        elif value != "auto":
            out[key] = value
    return out
