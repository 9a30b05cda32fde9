"""Learning rate as a factor of its peak."""

from __future__ import annotations

import math

from scale.config.optim import ScheduleConfig


def warmup_steps(config: ScheduleConfig, steps: int) -> int:
    """Length of the warm-up in steps."""
    return round(config.warmup * steps) if isinstance(config.warmup, float) else int(config.warmup)


def lr_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Factor for step `step` (from 1) of `steps`. Warm-up ends at 1.0; the last step of a decay is at `final`."""
    warmup = warmup_steps(config, steps)
    if step <= warmup:
        return step / warmup
    if config.kind == "constant":
        return 1.0
    start = warmup if config.kind != "wsd" else max(warmup, steps - round(config.decay * steps))
    progress = min(max(step - start, 0) / max(1, steps - start), 1.0)
    if config.kind == "cosine":
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - (1 - config.final) * progress
