"""DeepSpeed's memory by formula: its engine cannot be run on fake ranks."""

from __future__ import annotations

from scale.models.size import Size, activation_bytes_per_token
from scale.plan.memory import PARTS, Memory
from scale.plan.settle import Settled

BUCKET = 500_000_000
"""Values in DeepSpeed's reduce bucket and in its prefetch and persistence windows (its defaults are 5e8 or below)."""
LIVE = 1_000_000_000
"""Gathered parameters that stage 3 keeps at most (stage3_max_live_parameters)."""


def zero_memory(settled: Settled, size: Size) -> Memory:
    """ZeRO stage 2 or 3 (arXiv 1910.02054, section 5) with mixed precision and AdamW: fp32 masters and two moments, 12
    bytes a parameter, always sharded; 2-byte weights whole (2) or sharded (3); fp32 gradients sharded.

    In fp32 the weights take 4 bytes. Activations are the estimate that also chooses the micro-batch.
    """
    stage, gpus = settled.config.compute.deepspeed.stage, settled.gpus
    offload = settled.config.compute.deepspeed.offload
    width = 4 if settled.choices.precision.value == "fp32" else 2
    every = None if settled.choices.recompute.value == "off" else int(settled.choices.recompute.value)
    share = 1 if stage == 2 else gpus
    parts = dict.fromkeys(PARTS, 0) | {
        "weights": width * size.total // share,
        "gradients": 4 * size.trainable // gpus,
        "optimizer": 12 * size.trainable // gpus,
        "activations": activation_bytes_per_token(settled.model.config, every, width)
        * settled.micro_rows
        * settled.config.data.seq_len,
        "gathered weights": 0 if stage == 2 else width * min(LIVE, size.total),
        "gradient exchange": 2 * width * min(BUCKET, size.trainable),
    }
    held = {name: parts[name] for name in ("weights", "gradients", "optimizer")}
    host = parts["optimizer"] if offload else 0
    return Memory(held, parts | ({"optimizer": 0} if offload else {}), "computed, not traced", host)
