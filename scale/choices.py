"""Every `auto` of a config, decided: from the hardware, the model and, for FP8, a measurement. No side effects but Liger's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from scale.checkpoint.saved import saved_in
from scale.config import PretrainRun
from scale.config.run import ComputeConfig
from scale.errors import UsageError
from scale.hardware import (
    Choice,
    Hardware,
    choose_attention,
    choose_compile,
    choose_kernels,
    choose_loss,
    choose_micro_rows,
    choose_precision,
    choose_recompute,
    has_fp8,
    peak_flops,
)
from scale.models.attention import supported_attention
from scale.models.build import build_model
from scale.models.fp8 import backend, convert, matrix_shapes
from scale.models.fp8_speed import measure, speedup
from scale.models.heads import obstacle
from scale.models.hf_config import model_config
from scale.models.kernels import apply_liger, liger_knows
from scale.models.size import activation_bytes_per_token, model_size
from scale.monitor.run_folder import RunFolder
from scale.parallel.footprint import Footprint, footprint
from scale.protocols import Weights

NO_KERNELS = Choice("off", "not asked for")
_MEASURED_TOKENS = 8192
"""Rows of the matrices that FP8 is measured with, where batch.micro is automatic."""


@dataclass(frozen=True)
class Choices:
    """Everything that was `auto`, decided."""

    strategy: Choice
    precision: Choice
    compile: Choice
    attention: Choice
    kernels: Choice
    recompute: Choice
    micro_rows: Choice
    loss: Choice
    peak_flops: Choice


@dataclass(frozen=True)
class Model:
    """A model with its architecture in place; weights may still be on the meta device."""

    module: nn.Module
    weights: Weights | None
    config: Any


def choose_code(config: PretrainRun, hardware: Hardware) -> tuple[Choice, Choice]:
    """Attention and kernels, which a model is built with. Liger's kernels are put in place, for the whole process."""
    hf_config = model_config(config.model)
    attention = attention_of(config, hardware, hf_config)
    kernels = kernels_of(config, hardware, hf_config)
    if kernels.value == "liger":
        if config.model.preset is not None:
            build_model(config.model, hf_config, "eager", config.seed)  # refuses sizes, which it cannot after the patch
        apply_liger(hf_config.model_type)
    return attention, kernels


def attention_of(config: PretrainRun, hardware: Hardware, hf_config: PretrainedConfig) -> Choice:
    """Attention of this model, with the precision it will meet. Raises MissingExtra for a package that is not installed."""
    compute = config.compute
    precision = choose_precision(compute.precision, hardware, compute.fp8.emulate)
    supported = supported_attention(hf_config)
    return choose_attention(compute.attention, hardware, supported, config.data.cross_documents, precision.value)


def kernels_of(config: PretrainRun, hardware: Hardware, hf_config: PretrainedConfig) -> Choice:
    """Kernels of this model; none is put in place. Raises MissingExtra for a package that is not installed."""
    asked = config.compute.kernels
    known = hardware.device == "cuda" and asked != "off" and liger_knows(hf_config.model_type)
    return choose_kernels(asked, hardware, hf_config.model_type, known)


def measured_precision(config: PretrainRun, hardware: Hardware, model: Model, strategy: Choice) -> Choice:
    """Precision, for `auto` by timing this model's matrices in FP8 where the card has it; a resumed run keeps what it had.

    To be called on one rank, as timings differ.
    """
    compute = config.compute
    plain = choose_precision(compute.precision, hardware, compute.fp8.emulate)
    able = has_fp8(hardware) and backend(compute.fp8) == "torchao" and strategy.value != "deepspeed"
    if compute.precision != "auto" or not able or config.adapter is not None:
        return plain
    before = _precision_before(config)
    if before is not None:
        return Choice(before, "as this run was started")
    shapes = matrix_shapes(model.module, compute.fp8)
    if not shapes:
        return Choice(plain.value, f"{plain.reason}; no matrix has sides of {compute.fp8.smallest}, for fp8")
    micro = config.batch.micro
    tokens = micro * config.data.seq_len if isinstance(micro, int) else _MEASURED_TOKENS
    return choose_precision("auto", hardware, speedup=speedup(measure(shapes, tokens, compute.fp8)))


def _precision_before(config: PretrainRun) -> str | None:
    """What `auto` was in the newest checkpoint that says so."""
    for saved in reversed(saved_in(RunFolder(Path(config.runs_dir) / config.name).checkpoints)):
        try:
            found = saved.state()["settled"].get("compute.precision")
        except (OSError, ValueError, KeyError):  # damaged: resuming passes over it as well
            continue
        if found is not None:
            return str(found)
    return None


def decide(
    config: PretrainRun,
    hardware: Hardware,
    model: Model,
    attention: Choice,
    strategy: Choice,
    world_size: int,
    kernels: Choice = NO_KERNELS,
    precision: Choice | None = None,
) -> Choices:
    """Replace every `auto`."""
    compute, size = config.compute, model_size(model.module)
    if precision is None:
        precision = choose_precision(compute.precision, hardware, compute.fp8.emulate)
    blocked = obstacle(model.module)
    chunks = compute.loss != "full" and blocked is None
    choices = Choices(
        strategy=strategy,
        precision=precision,
        compile=choose_compile(compute.compile, hardware, strategy.value),
        attention=attention,
        kernels=kernels,
        recompute=choose_recompute(compute.recompute, size.total),
        micro_rows=Choice(str(config.batch.micro), "asked for"),
        loss=Choice("chunked" if chunks else "full", ""),  # for the first guess of the micro-batch
        peak_flops=peak_flops(hardware, precision.value),
    )
    for _ in range(2):  # where all logits are few, they count in the micro-batch after all
        if config.batch.micro == "auto":
            choices = replace(choices, micro_rows=_micro_rows(config, hardware, model, choices, world_size))
        tokens = int(choices.micro_rows.value) * config.data.seq_len
        vocabulary = getattr(model.config, "vocab_size", 0)
        loss = choose_loss(compute.loss, hardware, tokens, vocabulary, blocked, precision.value)
        choices = replace(choices, loss=loss)
    return choices


def _micro_rows(config: PretrainRun, hardware: Hardware, model: Model, choices: Choices, world_size: int) -> Choice:
    rows, states = config.rows_per_step // world_size, held_by_device(config, model, choices, world_size).device
    return choose_micro_rows(rows, config.data.seq_len, activation_bytes(model, choices), states, hardware)


def held_by_device(config: PretrainRun, model: Model, choices: Choices, world_size: int) -> Footprint:
    """Estimated weights, gradients and moments on one device under these choices."""
    size, strategy, precision = model_size(model.module), choices.strategy.value, choices.precision.value
    return footprint(size, config.compute, config.optim.kind, strategy, world_size, precision)


def to_fp8(config: PretrainRun, model: Model, choices: Choices) -> Choices:
    """Convert the model's matrices if fp8 was chosen; the choice then says how many."""
    if choices.precision.value != "fp8":
        return choices
    converted = convert(model.module, config.compute.fp8, fp8_gather=choices.strategy.value == "fsdp")
    return replace(choices, precision=Choice("fp8", f"{choices.precision.reason}; {converted}"))


def settled(config: PretrainRun, choices: Choices, world_size: int) -> dict[str, str]:
    """What was `auto` and bears on the course of the run: a resumed run must choose the same. The micro-batch, and the loss
    that follows from it, are bound to a number of ranks; with another number the order of sums differs anyway."""
    asked: dict[str, Any] = {f"compute.{key}": value for key, value in config.compute.model_dump().items()}
    asked["batch.micro"] = config.batch.micro
    made = {
        "compute.precision": choices.precision,
        "compute.compile": choices.compile,
        "compute.attention": choices.attention,
        "compute.kernels": choices.kernels,
        "compute.recompute": choices.recompute,
        "compute.loss": choices.loss,
        "batch.micro": choices.micro_rows,
    }
    chosen = {key: choice.value for key, choice in made.items() if asked[key] == "auto"}
    for key in ("batch.micro", "compute.loss"):
        if key in chosen:
            chosen[f"{key} with {choices.strategy.value} on {world_size} ranks"] = chosen.pop(key)
    return chosen


def activation_bytes(model: Model, choices: Choices) -> int:
    """Estimated activation memory of one token under these choices."""
    every = None if choices.recompute.value == "off" else int(choices.recompute.value)
    width = 4 if choices.precision.value == "fp32" else 2
    return activation_bytes_per_token(model.config, every, width, logits=choices.loss.value == "full")


def choose_strategy(compute: ComputeConfig, world_size: int) -> Choice:
    """single, fsdp or deepspeed. Raises UsageError for one device on several ranks, and for options which ask for what the
    automatic choice does not do."""
    asked = compute.strategy
    if asked == "single" and world_size > 1:
        raise UsageError(
            f"compute.strategy = 'single': {world_size} ranks were started (use fsdp or deepspeed, or start one process)"
        )
    if asked != "auto":
        return Choice(asked, f"asked for, {world_size} rank(s)")
    chosen = Choice("fsdp", f"{world_size} ranks") if world_size > 1 else Choice("single", "one process")
    _check_read(compute, chosen)
    return chosen


def _check_read(compute: ComputeConfig, chosen: Choice) -> None:
    """Raises UsageError for offloading, shards or a JSON that only another strategy than the automatic one would heed."""
    unread: list[tuple[str, str, str]] = []
    if compute.deepspeed.offload:
        unread.append(("deepspeed", "offload", "true"))
    if compute.deepspeed.config is not None:
        unread.append(("deepspeed", "config", repr(compute.deepspeed.config)))
    if chosen.value == "single" and compute.fsdp.offload:
        unread.append(("fsdp", "offload", "true"))
    if chosen.value == "single" and compute.fsdp.shard not in ("all", 1):
        unread.append(("fsdp", "shard", str(compute.fsdp.shard)))
    for strategy, key, value in unread:
        raise UsageError(
            f"compute.{strategy}.{key} = {value}: strategy is {chosen.value} ({chosen.reason}); "
            f"remove the key, or use compute.strategy={strategy}"
        )
