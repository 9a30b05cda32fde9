"""Numbers derived from a config, shown before training starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scale.config.run import PretrainRun
from scale.models.size import Size
from scale.parallel.footprint import Footprint


@dataclass(frozen=True)
class BatchShape:
    """How one optimizer step is cut up. Rows are rows of data.seq_len."""

    rows: int
    micro_rows: int
    world_size: int

    @property
    def accumulation(self) -> int:
        return self.rows // (self.micro_rows * self.world_size)


def total_steps(config: PretrainRun, train_tokens: int, fill: float) -> int:
    """Length of the run in optimizer steps, whichever unit it was given in. `fill`: share of a row that is not padding."""
    train = config.train
    if train.steps is not None:
        return train.steps
    tokens = train.tokens if train.tokens is not None else (train.epochs or 0) * train_tokens
    return max(1, math.ceil(tokens / (config.tokens_per_step * fill)))


def passes(tokens: float, weights: Sequence[float], positions: Sequence[int]) -> list[float]:
    """How often a run of so many tokens (padding not counted) goes through each source of so many positions."""
    return [tokens * weight / sum(weights) / size for weight, size in zip(weights, positions, strict=True)]


def total_flops(config: PretrainRun, steps: int, fill: float, flops_per_token: Callable[[int], float]) -> float:
    """FLOPs of the whole run, each part of the curriculum at its own row length."""
    ends = [lesson.until for lesson in config.data.curriculum] + [1.0]
    lengths = [lesson.seq_len for lesson in config.data.curriculum] + [config.data.seq_len]
    shares = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
    tokens = steps * config.tokens_per_step * fill
    return sum(share * tokens * flops_per_token(n) for share, n in zip(shares, lengths, strict=True))


def run_facts(
    config: PretrainRun,
    size: Size,
    flops_per_token: Callable[[int], float],
    shape: BatchShape,
    steps: int,
    fill: float,
) -> dict[str, Any]:
    """Derived numbers by name; plain numbers and strings, so that they can be written as JSON."""
    return {
        "parameters": size.total,
        "trainable parameters": size.trainable,
        "tokens per step": config.tokens_per_step,
        "rows per step": f"{shape.rows} x {config.data.seq_len} tokens, {fill:.1%} filled",
        "micro-batch": f"{shape.micro_rows} rows x {shape.accumulation} accumulated x {shape.world_size} device(s)",
        "steps": steps,
        "tokens (without padding)": round(steps * config.tokens_per_step * fill),
        "FLOPs per token": flops_per_token(config.data.seq_len),
        "FLOPs": total_flops(config, steps, fill, flops_per_token),
    }


def memory_facts(held: Footprint, activations: int) -> dict[str, str]:
    """What one device holds, and its host where states live there."""
    memory = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "activations": activations,
    }
    if held.host:
        memory["CPU states"] = held.host
    return {f"memory {name} (estimate for one device)": f"{value / 2**20:,.0f} MiB" for name, value in memory.items()}
