"""What training would choose on a card that is not here: every `auto`, the model, the strategy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig

from scale.build import STRATEGIES
from scale.cards import card_to_plan
from scale.checks import check_length
from scale.choices import Choices, Model, attention_of, choose_strategy, decide, kernels_of
from scale.config import PretrainRun
from scale.config.rows import check_rows
from scale.errors import MissingExtra, UsageError
from scale.hardware import Choice, Hardware
from scale.models.adapters import add_adapter
from scale.models.build import build_model, set_recompute
from scale.models.hf_config import model_config
from scale.models.kernels import has_liger
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.objectives.router import router_loss
from scale.parallel.ranks import Ranks
from scale.plan.fake import FUSED, fake_weights
from scale.plan.inputs import vocabulary

_ABSENT = "asked for; not installed on this machine"


@dataclass(frozen=True)
class Settled:
    """A config with every `auto` decided for `gpus` cards."""

    config: PretrainRun
    gpus: int
    hardware: Hardware
    model: Model
    choices: Choices

    @property
    def micro_rows(self) -> int:
        return int(self.choices.micro_rows.value)

    @property
    def accumulation(self) -> int:
        return self.config.rows_per_step // (self.micro_rows * self.gpus)


class _Planned(Hardware):
    """A card that is not here: where a datasheet says nothing, nothing can be timed either. MFU then counts from bf16."""

    def peak(self, precision: str) -> float | None:
        return super().peak(precision) or super().peak("bf16")


def planned(gpu: str) -> Hardware:
    """The card of this short name. Raises UsageError for an unknown one, or one without the peak that days follow from."""
    card_to_plan(gpu)
    found = Hardware.of(gpu)
    return _Planned(found.device, found.name, found.memory, found.cores, found.capability)


def settle(config: PretrainRun, gpus: int, hardware: Hardware) -> Settled:
    """Decide as training on `gpus` such cards would. Raises UsageError for what cannot run there."""
    check_length(config)
    _check_rows(config, gpus)
    strategy = choose_strategy(config.compute, gpus)
    hf_config = model_config(config.model, vocabulary(config))
    attention, kernels = _code(config, hardware, hf_config)
    module = _module(config, hf_config, attention.value)
    model = Model(module, fake_weights, hf_config)
    choices = _decide(config, hardware, model, attention, strategy, gpus, kernels)
    if choices.recompute.value != "off":
        set_recompute(module, int(choices.recompute.value))
    return Settled(config, gpus, hardware, model, choices)


def _code(config: PretrainRun, hardware: Hardware, hf_config: PretrainedConfig) -> tuple[Choice, Choice]:
    """Attention and kernels as training chooses them; what is asked for may be missing on the machine of the plan."""
    try:
        attention = attention_of(config, hardware, hf_config)
    except MissingExtra:
        attention = Choice(config.compute.attention, _ABSENT)
    try:
        kernels = kernels_of(config, hardware, hf_config)
    except MissingExtra:
        kernels = Choice(config.compute.kernels, _ABSENT)
    if kernels.value == "liger":
        kernels = replace(kernels, reason=f"{kernels.reason}; memory is planned without it")
    return attention, kernels


def _module(config: PretrainRun, hf_config: PretrainedConfig, attention: str) -> nn.Module:
    """The model on the meta device. Causal sdpa needs no mask where attention crosses documents, so it is fused too."""
    fused = attention.startswith("fl") or (attention == "sdpa" and config.data.cross_documents)
    kind = config.model if config.model.preset else config.model.model_copy(update={"init": "random"})
    with torch.device("meta"):
        module, _ = build_model(kind, hf_config, FUSED if fused else attention, config.seed)
        if has_liger(module):
            raise UsageError("Liger's kernels are in place in this process and cannot be traced: plan before training")
        return module if config.adapter is None else add_adapter(module, config.adapter, config.seed)


def _decide(
    config: PretrainRun,
    hardware: Hardware,
    model: Model,
    attention: Choice,
    strategy: Choice,
    gpus: int,
    kernels: Choice,
) -> Choices:
    """As training decides, but FP8 cannot be measured, and Cut-Cross-Entropy stands as chunks (256 MiB of logits more)."""
    if config.compute.loss != "cce":
        return decide(config, hardware, model, attention, strategy, gpus, kernels)
    chunked = config.model_copy(update={"compute": config.compute.model_copy(update={"loss": "chunked"})})
    choices = decide(chunked, hardware, model, attention, strategy, gpus, kernels)
    return replace(choices, loss=Choice("cce", "asked for; planned as chunked"))


def make_root(settled: Settled) -> nn.Module:
    """What the strategy wraps."""
    module = settled.model.module
    loss = "full" if settled.choices.loss.value == "full" else "chunked"
    return Root(module, CausalLM(loss=loss, router=router_loss(module)))


def make_strategy(settled: Settled, ranks: Ranks) -> object:
    """The strategy of the run; offloaded parts are traced on the device and moved afterwards, FP8 as bf16."""
    compute = settled.config.compute
    resident = compute.model_copy(update={"fsdp": compute.fsdp.model_copy(update={"offload": False})})
    precision = "fp32" if settled.choices.precision.value == "fp32" else "bf16"
    return STRATEGIES[settled.choices.strategy.value](ranks, resident, precision, "off")


def _check_rows(config: PretrainRun, gpus: int) -> None:
    """As `check_rows`, with the numbers of GPUs that would do. Raises UsageError."""
    rows = config.rows_per_step
    if rows % gpus == 0:
        return check_rows(config, gpus)
    below = max(n for n in range(1, min(gpus, rows) + 1) if rows % n == 0)
    above = next((n for n in range(gpus + 1, rows + 1) if rows % n == 0), None)
    near = " or ".join(f"--gpus {n}" for n in (below, above) if n is not None)
    even = sorted({max(1, rows // gpus) * gpus, -(-rows // gpus) * gpus})
    key, size = ("batch.tokens", config.data.seq_len) if config.batch.tokens is not None else ("batch.sequences", 1)
    raise UsageError(
        f"--gpus {gpus}: does not divide the {rows} rows of a step "
        f"(use {near}, or {' or '.join(f'{key}={n * size}' for n in even)})"
    )
