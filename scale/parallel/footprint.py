"""What one device holds from step to step under a strategy's options: arithmetic, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

from scale.config.run import ComputeConfig, DeepSpeedConfig, FsdpConfig
from scale.models.size import Size

MOMENTS = {"adamw": 8, "adamw8bit": 2, "muon": 6}
"""Bytes of moments for each trained parameter; Muon has one moment for a matrix and AdamW's two for the rest."""
BUCKET = 500_000_000
"""Values in DeepSpeed's reduce bucket and in its prefetch and persistence windows (its defaults are 5e8 or below)."""
LIVE = 1_000_000_000
"""Gathered parameters that stage 3 keeps at most (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on one device: weights, gradients, moments (with DeepSpeed's masters), other ranks' weights that stay gathered
    through a step, gradients on their way to other ranks. `host`: states that live in CPU memory instead.

    What fsdp gathers and exchanges for one layer at a time is not counted.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int = 0
    exchange: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.exchange


def footprint(
    size: Size, compute: ComputeConfig, optimizer: str, strategy: str, ranks: int, precision: str
) -> Footprint:
    """Of one of `ranks` devices under single, fsdp or deepspeed, with an `optim.kind` and fp32 or bf16 products."""
    width = 4 if precision == "fp32" else 2
    if strategy == "deepspeed":
        return _deepspeed(size, compute.deepspeed, MOMENTS[optimizer], ranks, width)
    if strategy == "fsdp":
        return _fsdp(size, compute.fsdp, MOMENTS[optimizer], ranks, width)
    return Footprint(4 * size.total, 4 * size.trainable, MOMENTS[optimizer] * size.trainable)


def trained_here(size: Size, compute: ComputeConfig, strategy: str, ranks: int) -> int:
    """Trainable parameters whose fp32 masters lie on one of `ranks` devices (on average: shards are uneven)."""
    if strategy == "single":
        return size.trainable
    shard = compute.fsdp.shard if strategy == "fsdp" else "all"
    return size.trainable // (ranks if shard == "all" else shard)


def _fsdp(size: Size, config: FsdpConfig, moments: int, ranks: int, width: int) -> Footprint:
    """fp32 masters, gradients and moments, each cut over the ranks that share a copy of the model."""
    shard = ranks if config.shard == "all" else config.shard
    states = (4 * size.total // shard, 4 * size.trainable // shard, moments * size.trainable // shard)
    gathered = 0 if config.reshard else width * size.total
    exchange = 4 * size.trainable if config.reduce == "step" else 0
    if config.offload:
        return Footprint(0, 0, 0, gathered, exchange, host=sum(states))
    return Footprint(*states, gathered, exchange)


def _deepspeed(size: Size, config: DeepSpeedConfig, moments: int, ranks: int, width: int) -> Footprint:
    """ZeRO stage 2 or 3 (arXiv 1910.02054, section 5): fp32 masters, moments and gradients are always cut over the ranks,
    the weights that compute (2 bytes in bf16, else 4) in stage 3 only. Offloading leaves these on the device alone."""
    weights = width * size.total // (1 if config.stage == 2 else ranks)
    gradients, optimizer = 4 * size.trainable // ranks, (4 + moments) * size.trainable // ranks
    gathered = 0 if config.stage == 2 else width * min(LIVE, size.total)
    exchange = 2 * width * min(BUCKET, size.trainable)
    if config.offload:
        return Footprint(weights, 0, 0, gathered, exchange, host=gradients + optimizer)
    return Footprint(weights, gradients, optimizer, gathered, exchange)
