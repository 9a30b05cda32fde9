"""How long a step should take by the datasheets: an estimate by which settings are compared, never a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from scale.models.size import Size, activation_bytes_per_token
from scale.plan.settle import Settled

PRODUCTS = 0.6
"""Share of the peak FLOP/s that large matrix products are taken to reach."""
MEMORY = 0.8
"""Share of the memory bandwidth that passes over memory are taken to reach."""
LINKS = 0.7
"""Share of the bandwidth of links that collectives are taken to reach."""
NODE = 8
"""GPUs of one machine."""
NETWORK = 50e9
"""Bytes a second, each way, of each GPU beyond its machine: 400 Gbit/s."""
HOST = 5e-4
"""Seconds in which the CPU issues the kernels of one layer, forward and backward."""
MOVES = 4
"""Times that a value which backward keeps passes through memory: written, read, and its gradient as well."""


@dataclass(frozen=True)
class Bill:
    """What bears on the time of one micro-batch. Parameters: `layer` in each of `layers` decoder layers, `outside` in the
    rest, `trained` share of them. Of one token: `forward` and `backward` FLOPs, `moved` bytes of activations, `again` share
    of the layers that run forward twice. `width`: bytes of a weight in products."""

    layers: int
    layer: float
    outside: int
    trained: float
    forward: float
    backward: float
    moved: float
    again: float
    width: int


def bill_of(settled: Settled, size: Size, outside: int, flops_per_token: float) -> Bill:
    """The bill of a settled run. `outside`: parameters outside the decoder layers; `flops_per_token`: forward and backward,
    without recomputation."""
    recompute, model = settled.choices.recompute.value, settled.model
    layers = max(1, getattr(model.config, "num_hidden_layers", 1))
    third = 2 * size.matrix  # a forward pass multiplies every matrix once; backward twice, a frozen one once
    attention = flops_per_token - third - (4 * size.matrix - 2 * min(size.total - size.trainable, size.matrix))
    forward = third + attention / 3
    width = 4 if settled.choices.precision.value == "fp32" else 2
    return Bill(
        layers=layers,
        layer=(size.total - outside) / layers,
        outside=outside,
        trained=size.trainable / size.total,
        forward=forward,
        backward=flops_per_token - forward,
        moved=MOVES * activation_bytes_per_token(model.config, None, width, settled.choices.loss.value == "full"),
        again=0.0 if recompute == "off" else len(range(0, layers, int(recompute))) / layers,
        width=width,
    )


def step_seconds(settled: Settled, bill: Bill) -> float:
    """Seconds of one optimizer step: micro-batches one after the other, then a pass of the optimizer over its states.

    Of each layer the slower of products and memory counts, and of those and the exchange of weights and gradients with other
    GPUs, which run side by side. What lies outside the layers is exchanged before and after, with nothing beside it.
    """
    facts = settled.hardware.facts
    assert facts is not None  # a card to plan with
    peak, memory = float(settled.choices.peak_flops.value) * PRODUCTS, facts.bandwidth * 1e9 * MEMORY
    tokens = settled.micro_rows * settled.config.data.seq_len
    gather, regather, reduce, each = _exchange(settled, bill)
    read = bill.width * bill.layer / memory
    moved = bill.moved * tokens / bill.layers / memory
    forward = max(bill.forward * tokens / bill.layers / peak + moved / 3, read)
    backward = max(bill.backward * tokens / bill.layers / peak + moved * 2 / 3, read) + forward * bill.again
    added = 12 * bill.layer * bill.trained / memory  # a gradient is written, then read and added to what is there
    layer = max(forward, gather * bill.layer) + max(backward + added, (regather + reduce * each) * bill.layer)
    alone = (gather + reduce * each) * bill.outside
    micro = max(bill.layers * layer, bill.layers * HOST) + alone
    last = 0.0 if each else reduce * (bill.layer * bill.layers + bill.outside)
    states = 28 * bill.trained * (bill.layer * bill.layers + bill.outside) / _shards(settled) / memory
    return settled.accumulation * micro + last + states


def _exchange(settled: Settled, bill: Bill) -> tuple[float, float, float, int]:
    """Seconds for each parameter: to gather it for forward, once more for backward, to reduce its gradient; and whether
    that is done in each micro-batch or once a step."""
    compute, strategy = settled.config.compute, settled.choices.strategy.value
    if strategy == "single" or settled.gpus == 1:
        return 0.0, 0.0, 0.0, 1
    shards = _shards(settled)
    gather = bill.width * seconds_for_each_byte(settled, shards)
    reduce = 4 * bill.trained * seconds_for_each_byte(settled, shards)
    if strategy == "deepspeed":
        return (gather, gather, reduce / 2, 1) if compute.deepspeed.stage == 3 else (0.0, 0.0, reduce / 2, 1)
    copies = settled.gpus // shards
    if copies > 1:  # each rank then sums its rows over the copies, most of them on other machines
        link = NETWORK if settled.gpus > NODE else _link(settled)
        reduce += 4 * bill.trained / shards * 2 * (copies - 1) / copies / (link * LINKS)
    return gather, gather if compute.fsdp.reshard else 0.0, reduce, int(compute.fsdp.reduce == "micro")


def seconds_for_each_byte(settled: Settled, ranks: int) -> float:
    """Of what `ranks` GPUs gather: what the links inside a machine take, or its way into the machine where that is longer."""
    inside = (ranks - 1) / ranks / _link(settled)
    beyond = max(0, ranks - NODE) / ranks / (NODE * NETWORK)
    return max(inside, beyond) / LINKS


def _link(settled: Settled) -> float:
    facts = settled.hardware.facts
    assert facts is not None
    return facts.link * 1e9


def _shards(settled: Settled) -> int:
    """Ranks that share one copy of the model's states."""
    shard = settled.config.compute.fsdp.shard
    if settled.choices.strategy.value == "single":
        return 1
    return settled.gpus if settled.choices.strategy.value == "deepspeed" or shard == "all" else int(shard)
