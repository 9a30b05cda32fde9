"""The bill of a run: what it holds, computes and takes, before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from scale.config import PretrainRun
from scale.hardware import Hardware
from scale.models.size import Size, experts_of, flops_per_token, model_size
from scale.parallel.footprint import trained_here
from scale.parallel.fsdp import decoder_layers
from scale.parallel.ranks import Ranks
from scale.plan.fake import fake_ranks, fake_tensors, fake_weights
from scale.plan.hub import need_hub
from scale.plan.inputs import length
from scale.plan.memory import Memory, fake_batch, trace_step
from scale.plan.settle import Settled, make_root, make_strategy, settle
from scale.plan.speed import Bill, bill_of, step_seconds
from scale.plan.zero import zero_memory
from scale.predict.weights.memory import footprint
from scale.train.facts import total_flops

USABLE = 0.92
"""Share of a card's memory that a step may fill: the CUDA context, NCCL's buffers, workspaces of the math libraries and
gaps between blocks of the allocator take the rest."""

_NUMBERS = ("micro_rows", "peak_flops")
"""Choices that stand elsewhere as numbers."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """One run on `gpus` cards. Memory in bytes on one GPU; `flops` of the whole run; `fill`: share of rows not padding."""

    settled: Settled
    size: Size
    active: int
    memory: Memory
    steps: int
    fill: float
    flops: float
    flops_per_token: float
    mfu: float
    bill: Bill
    passes: str = ""
    """How often each source is seen, where the data were looked at."""

    @property
    def usable(self) -> int:
        return int(USABLE * self.settled.hardware.memory)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.usable

    @property
    def peak_flops(self) -> float:
        """Of one card, FLOP/s."""
        return float(self.settled.choices.peak_flops.value)

    @property
    def seconds(self) -> float:
        """Of one step by the datasheets, to compare plans by. The days follow from `mfu` instead."""
        return step_seconds(self.settled, self.bill)

    @property
    def days(self) -> float:
        return self.flops / (self.settled.gpus * self.peak_flops * self.mfu) / 86_400

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.settled.gpus

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain numbers and strings."""
        settled, config = self.settled, self.settled.config
        return {
            "name": config.name,
            "gpus": settled.gpus,
            "gpu": settled.hardware.name,
            "parameters": {"total": self.size.total, "trainable": self.size.trainable, "active": self.active},
            "choices": {name: c.value for name, c in vars(settled.choices).items() if name not in _NUMBERS},
            "batch": {
                "tokens": config.tokens_per_step,
                "rows": config.rows_per_step,
                "seq_len": config.data.seq_len,
                "micro": settled.micro_rows,
                "accumulation": settled.accumulation,
            },
            "memory": {
                "method": self.memory.method,
                "held": self.memory.held,
                "at_peak": self.memory.at_peak,
                "peak": self.memory.peak,
                "cpu": self.memory.host,
                "card": settled.hardware.memory,
                "usable": self.usable,
                "fits": self.fits,
            },
            "run": {
                "steps": self.steps,
                "tokens": round(self.steps * config.tokens_per_step * self.fill),
                "fill": self.fill,
                "passes": self.passes,
                "flops_per_token": self.flops_per_token,
                "flops": self.flops,
                "mfu": self.mfu,
                "peak_flops": self.peak_flops,
                "days": self.days,
                "gpu_hours": self.gpu_hours,
            },
        }


def make_plan(
    config: PretrainRun, gpus: int, hardware: Hardware, mfu: float = 0.4, say: Say = lambda text: None
) -> Plan:
    """Settle, trace, count. Raises UsageError for what cannot run on these cards; `say` hears what takes its time."""
    need_hub(config)
    settled = settle(config, gpus, hardware)
    steps, fill, passes = length(config)
    size = model_size(settled.model.module)
    active = active_parameters(settled.model.module, settled.model.config, size.total)
    trained = trained_here(size, config.compute, settled.choices.strategy.value, gpus)
    flops = partial(flops_per_token, size, settled.model.config)
    per_token = flops(config.data.seq_len)
    bill = bill_of(settled, size, parameters_outside(settled.model.module, size.total), per_token)
    return Plan(
        settled=settled,
        size=size,
        active=active,
        memory=with_prediction(measure(settled, say), config, trained),
        steps=steps,
        fill=fill,
        flops=total_flops(config, steps, fill, flops),
        flops_per_token=per_token,
        mfu=mfu,
        bill=bill,
        passes=passes,
    )


def measure(settled: Settled, say: Say) -> Memory:
    """Memory of one GPU: traced, or computed for deepspeed. Uses the model up: it is sharded in place."""
    config, choices = settled.config, settled.choices
    if choices.strategy.value == "deepspeed":
        return zero_memory(settled)
    layers = getattr(settled.model.config, "num_hidden_layers", 0)
    say(
        f"tracing a step: {layers} layers, {settled.micro_rows} x {config.data.seq_len} tokens, {settled.gpus} fake rank(s)"
    )
    root = make_root(settled)
    with ExitStack() as stack:
        if settled.gpus > 1 or choices.strategy.value == "fsdp":
            ranks = stack.enter_context(fake_ranks(settled.gpus))
        else:
            ranks = Ranks()
        strategy: Any = make_strategy(settled, ranks)
        getattr(strategy, "mesh", None)  # its ranks are real numbers: made before tensors are fake
        stack.enter_context(fake_tensors())
        wrapped = strategy.prepare(root, config.optim, fake_weights)
        batch = fake_batch(settled.micro_rows, config.data.seq_len)
        offload = choices.strategy.value == "fsdp" and config.compute.fsdp.offload
        return trace_step(wrapped, strategy, batch, min(settled.accumulation, 2), config.optim.clip, offload)


def with_prediction(memory: Memory, config: PretrainRun, numel: int) -> Memory:
    """With what predictive training keeps for `numel` trained elements on one GPU, its working memory included: an upper
    bound, as statistics and a backward pass never meet."""
    if not config.predict.enabled:
        return memory
    kept = sum(footprint(numel, config.predict.directions).values())
    return replace(memory, held={**memory.held, "prediction": kept}, at_peak={**memory.at_peak, "prediction": kept})


def parameters_outside(model: nn.Module, total: int) -> int:
    """Parameters that are in no decoder layer: embedding, head, last norm."""
    return total - sum(p.numel() for layer in decoder_layers(model) for p in layer.parameters())


def active_parameters(model: nn.Module, config: Any, total: int) -> int:
    """Parameters that one token meets: of the experts of each layer only those it visits."""
    experts, visited = experts_of(config)
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) if experts else 0
    return total - routed + routed * visited // max(experts, 1)
