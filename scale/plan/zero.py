"""DeepSpeed's memory by formula: its engine cannot be run on fake ranks."""

from __future__ import annotations

from scale.choices import activation_bytes, held_by_device
from scale.parallel.ranks import Ranks
from scale.parallel.zero import DeepSpeed, check_optimizer
from scale.plan.memory import PARTS, Memory
from scale.plan.settle import Settled


def zero_memory(settled: Settled) -> Memory:
    """The footprint that also chooses the micro-batch, and its estimate of activations.

    Raises UsageError for what the strategy refuses: a precision, an optimizer, a JSON that contradicts the config.
    """
    config, model, choices = settled.config, settled.model, settled.choices
    DeepSpeed(Ranks(), config.compute.deepspeed, choices.precision.value)
    check_optimizer(config.optim)
    resident = config.compute.deepspeed.model_copy(update={"offload": False})
    on_gpu = config.model_copy(update={"compute": config.compute.model_copy(update={"deepspeed": resident})})
    whole, held = (held_by_device(c, model, choices, settled.gpus) for c in (on_gpu, config))
    at_peak = dict.fromkeys(PARTS, 0) | {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "activations": activation_bytes(model, choices) * settled.micro_rows * config.data.seq_len,
        "gathered weights": held.gathered,
        "gradient exchange": held.exchange,
    }
    in_full = {"weights": whole.weights, "gradients": whole.gradients, "optimizer": whole.optimizer}
    return Memory(in_full, at_peak, "computed, not traced", held.host)
