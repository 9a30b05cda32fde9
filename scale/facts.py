"""What a run shows before training starts, put together from all rooms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scale.choices import Choices, Model, activation_bytes, held_by_device
from scale.config import PretrainRun
from scale.data.prepare import Prepared
from scale.hardware import Hardware
from scale.models.size import model_size
from scale.parallel.footprint import trained_here
from scale.predict.facts import predict_facts
from scale.train.facts import BatchShape, memory_facts, run_facts


def gather_facts(
    config: PretrainRun,
    hardware: Hardware,
    choices: Choices,
    prepared: Prepared,
    model: Model,
    shape: BatchShape,
    steps: int,
    fill: float,
    flops: Callable[[int], float],
) -> dict[str, Any]:
    """What is printed before training: the machine, every choice with its reason, every derived number."""
    size = model_size(model.module)
    return {
        "device": f"{hardware.name} ({hardware.device}, {hardware.memory / 2**30:.0f} GiB, {hardware.cores} cores)",
        **{name.replace("_", " "): str(choice) for name, choice in vars(choices).items()},
        "training tokens": sum(documents.tokens for documents in prepared.train),
        "held-out tokens": sum(documents.tokens for documents in prepared.valid),
        **run_facts(config, size, flops, shape, steps, fill),
        **memory_facts(
            held_by_device(config, model, choices, shape.world_size),
            activation_bytes(model, choices) * shape.micro_rows * config.data.seq_len,
        ),
        **predict_facts(
            config.predict, trained_here(size, config.compute, choices.strategy.value, shape.world_size), steps
        ),
    }
