"""Which knob to turn where a run does not fit: each is tried by making the plan again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scale.config import PretrainRun
from scale.errors import UsageError
from scale.models.size import experts_of
from scale.plan.memory import HELD
from scale.plan.plan import Plan, Say, make_plan

ENOUGH = 3
"""Knobs that fit, after which no further one is tried."""
MOST_GPUS = 16
"""More GPUs are tried up to this many times as many."""


@dataclass(frozen=True)
class Knob:
    """A change and what came of it: `peak` bytes on one GPU, by a plan made with it; `speedup`: how many times as fast a step
    should be, by `step_seconds`; None where that was not asked."""

    change: str
    peak: int
    fits: bool
    speedup: float | None = None


def advise(plan: Plan, say: Say = lambda text: None) -> list[Knob]:
    """Changes that were tried, in the order in which they cost least speed. Stops at the third that fits; where none
    alone does, they are tried together. Empty if the plan fits."""
    if plan.fits:
        return []
    tried: list[Knob] = []
    for values, gpus in _alone(plan):
        knob = attempt(plan, values, gpus, say)
        if knob is not None:
            tried.append(knob)
        if sum(knob.fits for knob in tried) == ENOUGH:
            return tried
    if not any(knob.fits for knob in tried):
        tried += _together(plan, say)
    return tried


def _alone(plan: Plan) -> Iterator[tuple[dict[str, Any], int]]:
    """Config values and number of GPUs of each knob alone."""
    config, gpus, choices = plan.settled.config, plan.settled.gpus, plan.settled.choices
    sharded = choices.strategy.value == "fsdp"
    experts, _ = experts_of(plan.settled.model.config)
    if sharded and config.compute.fsdp.shard == "all" and 0 < experts < gpus and gpus % experts == 0:
        yield (
            {"compute.fsdp.shard": experts},
            gpus,
        )  # FSDP2 cuts by experts and pads: further ranks hold, and send, nothing
    micro = _smaller_micro(plan)
    if micro is not None:
        yield {"batch.micro": micro}, gpus
    yield from (({"compute.fsdp.shard": shard}, gpus) for shard in _larger_shards(plan))
    if choices.recompute.value != "1":
        yield {"compute.recompute": 1, "batch.micro": plan.settled.micro_rows}, gpus
    if sharded and config.compute.fsdp.reduce == "step":
        yield {"compute.fsdp.reduce": "micro"}, gpus
    if sharded and not config.compute.fsdp.reshard:
        yield {"compute.fsdp.reshard": True}, gpus
    if choices.strategy.value == "single" and config.optim.kind == "adamw":
        yield {"optim.kind": "adamw8bit"}, gpus
    yield from (({}, more) for more in _more_gpus(plan))
    if sharded and not config.compute.fsdp.offload:
        yield {"compute.fsdp.offload": True}, gpus
    if choices.strategy.value == "deepspeed" and config.compute.deepspeed.stage == 2:
        yield {"compute.deepspeed.stage": 3}, gpus
    if choices.strategy.value == "deepspeed" and not config.compute.deepspeed.offload:
        yield {"compute.deepspeed.offload": True}, gpus


def _together(plan: Plan, say: Say) -> list[Knob]:
    """The smallest micro-batch with full recompute, alone and on more GPUs; the first that fits ends it."""
    gpus = plan.settled.gpus
    values: dict[str, Any] = {"batch.micro": 1, "compute.recompute": 1}
    for shard in _larger_shards(plan)[-1:]:
        values["compute.fsdp.shard"] = shard
    tries = [(values, gpus), *((values, more) for more in _more_gpus(plan))]
    if plan.settled.choices.strategy.value == "fsdp":
        tries.insert(1, (values | {"compute.fsdp.offload": True}, gpus))
    found = []
    for changed, count in tries:
        knob = attempt(plan, changed, count, say)
        if knob is not None:
            found.append(knob)
        if knob is not None and knob.fits:
            break
    return found


def _smaller_micro(plan: Plan) -> int | None:
    """The largest smaller micro-batch that should fit, if what is not held from step to step shrinks with it; the
    smallest one where none should; None where the micro-batch is one row."""
    now, rows = plan.settled.micro_rows, plan.settled.config.rows_per_step // plan.settled.gpus
    smaller = [n for n in range(now - 1, 0, -1) if rows % n == 0]
    parts = plan.memory.at_peak
    moving = parts["activations"] + parts["working memory"]
    for micro in smaller:
        if plan.memory.peak - moving + moving * micro / now <= plan.usable:
            return micro
    return 1 if smaller else None


def _larger_shards(plan: Plan) -> list[int | str]:
    """Where copies of the model are kept: the first larger share of the ranks with enough memory for what is held, then
    all ranks, or as many as there are experts."""
    shard, gpus = plan.settled.config.compute.fsdp.shard, plan.settled.gpus
    if plan.settled.choices.strategy.value != "fsdp" or shard == "all" or shard >= gpus:
        return []
    experts, _ = experts_of(plan.settled.model.config)
    most = min(gpus, experts or gpus)
    over, held = _over_and_held(plan)
    larger = [n for n in range(shard + 1, most + 1) if gpus % n == 0]
    enough = [n for n in larger if held * (1 - shard / n) >= over]
    return ["all" if n == gpus else n for n in sorted({*enough[:1], *larger[-1:]})]


def _over_and_held(plan: Plan) -> tuple[int, int]:
    """Bytes too many at the peak, and bytes of weights, gradients and moments in it."""
    return plan.memory.peak - plan.usable, sum(plan.memory.at_peak[name] for name in HELD)


def _more_gpus(plan: Plan) -> Iterator[int]:
    """Numbers of GPUs that divide the rows of a step: the first with enough memory for a share of what is held, and
    twice that. None where the size of a share is fixed."""
    config, gpus = plan.settled.config, plan.settled.gpus
    fixed = plan.settled.choices.strategy.value == "fsdp" and config.compute.fsdp.shard != "all"
    if config.compute.strategy == "single" or fixed:
        return
    over, held = _over_and_held(plan)
    counts = [n for n in range(gpus + 1, MOST_GPUS * gpus + 1) if config.rows_per_step % n == 0 and n % 2 == 0]
    enough = [n for n in counts if held * (1 - gpus / n) >= over]
    yield from enough[:1] + [n for n in enough[1:] if n >= 2 * enough[0]][:1]


def attempt(plan: Plan, values: dict[str, Any], gpus: int, say: Say) -> Knob | None:
    """Make the plan again with these values at their dotted keys; None where they cannot be had."""
    change = " ".join([named(plan, values), *([f"--gpus {gpus}"] if gpus != plan.settled.gpus else [])]).strip()
    say(f"trying {change}")
    try:
        made = make_plan(changed_config(plan.settled.config, values), gpus, plan.settled.hardware, plan.mfu)
    except UsageError:
        return None
    return Knob(change, made.memory.peak, made.fits, plan.seconds / made.seconds)


def named(plan: Plan, values: dict[str, Any]) -> str:
    """The overrides that a plan made with these values needs, as they are written on a command line."""
    return " ".join(f"{key}={_shown(value)}" for key, value in values.items() if _differs(plan, key, value))


def changed_config(config: PretrainRun, values: dict[str, Any]) -> PretrainRun:
    """The config with these values at their dotted keys."""
    content = config.model_dump()
    for key, value in values.items():
        *path, last = key.split(".")
        at = content
        for part in path:
            at = at[part]
        at[last] = value
    return PretrainRun.model_validate(content)


def _differs(plan: Plan, key: str, value: Any) -> bool:
    """Whether a value is another than the plan's own."""
    return not (key == "batch.micro" and value == plan.settled.micro_rows and plan.settled.config.batch.micro == value)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
