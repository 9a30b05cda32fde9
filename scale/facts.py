"""What a run shows before training starts, put together from all rooms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scale.choices import Choices, Model, activation_bytes, held_by_device
from scale.config import PretrainRun
from scale.data.prepare import Prepared
from scale.hardware import Hardware
from scale.models.size import model_size
from scale.parallel.footprint import trained_here
from scale.predict.facts import predict_facts
from scale.train.facts import BatchShape, memory_facts, passes, run_facts


def shown_counts(counts: Mapping[str, int]) -> str:
    """Such as "3 exact duplicates, 1 files (.csv)"."""
    return ", ".join(f"{n:,} {what}" for what, n in counts.items())


def shown_passes(config: PretrainRun, prepared: Prepared, weights: Sequence[float], steps: int, fill: float) -> str:
    """How often each source is seen, such as "web 1, books 2.5"."""
    seen = passes(steps * config.tokens_per_step * fill, weights, prepared.positions())
    if len(seen) == 1:
        return f"{seen[0]:.3g}"
    return ", ".join(f"{name} {n:.3g}" for name, n in zip(prepared.names, seen, strict=True))


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
    weights: Sequence[float],
) -> dict[str, Any]:
    """What is printed before training: the machine, every choice with its reason, every derived number."""
    size = model_size(model.module)
    return {
        "device": f"{hardware.name} ({hardware.device}, {hardware.memory / 2**30:.0f} GiB, {hardware.cores} cores)",
        **{name.replace("_", " "): str(choice) for name, choice in vars(choices).items()},
        "training tokens": sum(documents.tokens for documents in prepared.train),
        "held-out tokens": sum(documents.tokens for documents in prepared.valid),
        **{f"left out of {name}": shown_counts(counts) for name, counts in prepared.left_out().items()},
        **run_facts(config, size, flops, shape, steps, fill),
        "passes": shown_passes(config, prepared, weights, steps, fill),
        **memory_facts(
            held_by_device(config, model, choices, shape.world_size),
            activation_bytes(model, choices) * shape.micro_rows * config.data.seq_len,
        ),
        **predict_facts(
            config.predict, trained_here(size, config.compute, choices.strategy.value, shape.world_size), steps
        ),
    }
