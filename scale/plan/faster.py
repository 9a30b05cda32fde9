"""Settings that use a card which has room to spare: ranked by an estimate of time, each listed one traced by its own plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from scale.choices import activation_bytes
from scale.errors import UsageError
from scale.hardware import Choice
from scale.models.size import experts_of
from scale.plan.advice import Knob, changed_config, named
from scale.plan.memory import HELD
from scale.plan.plan import Plan, Say, make_plan
from scale.plan.settle import Settled
from scale.plan.speed import NODE, bill_of, step_seconds

WORTH = 1.02
"""Times as fast as the plan, below which nothing is listed but a larger micro-batch, which then says that it gains little."""
TRIES = 2
"""Plans made at most for one line: the first is foreseen from the plan at hand, the second from both."""

Values = dict[str, Any]


@dataclass(frozen=True)
class _Candidate:
    """Values beside the micro-batch, rows of it, and the seconds that a step should take by the estimate."""

    values: Values
    micro: int
    settled: Settled
    seconds: float

    @property
    def all_values(self) -> Values:
        return {**self.values, "batch.micro": self.micro}


def faster(plan: Plan, say: Say = lambda text: None) -> list[Knob]:
    """The setting that should be fastest, and the largest micro-batch with all else as it is, where they fit; the fastest
    first. Empty where the plan itself does not fit or nothing else should be faster."""
    if not plan.fits:
        return []
    best = _best(plan, _kinds(plan), say)
    alone = best if best is None or set(best[0]) == {"batch.micro"} else _best(plan, [{}], say)
    knobs = {}
    for found in (best, alone):
        if found is not None and (found is alone or plan.seconds / found[1].seconds >= WORTH):
            values, made = found
            change = named(plan, values)
            knobs[change] = Knob(change, made.memory.peak, made.fits, plan.seconds / made.seconds)
    return list(knobs.values())


def _kinds(plan: Plan) -> Iterator[Values]:
    """Values to combine with each micro-batch: less recomputation, and under fsdp copies of the model of one machine each or
    weights that stay gathered from the forward to the backward pass."""
    config, choices, gpus = plan.settled.config, plan.settled.choices, plan.settled.gpus
    again = choices.recompute.value
    layers = getattr(plan.settled.model.config, "num_hidden_layers", 0)
    recompute: list[Values] = [{}]
    if again != "off":
        fewer = [k for k in (2, 4) if int(again) < k < layers]
        recompute += [{"compute.recompute": k} for k in (*fewer, "off")]
    sharding: list[Values] = [{}]
    experts, _ = experts_of(plan.settled.model.config)
    if choices.strategy.value == "fsdp":
        if config.compute.fsdp.shard == "all" and gpus > NODE and gpus % NODE == 0 and experts % NODE == 0:
            sharding.append({"compute.fsdp.shard": NODE})
        if config.compute.fsdp.reshard:
            sharding.append({"compute.fsdp.reshard": False})
    yield from ({**a, **b} for a in recompute for b in sharding)


def _best(plan: Plan, kinds: Iterable[Values], say: Say) -> tuple[Values, Plan] | None:
    """The fastest setting by the estimate of those that fit by their own trace; which ones should is foreseen."""
    candidates = sorted(_candidates(plan, kinds), key=lambda candidate: (candidate.seconds, -candidate.micro))
    traced: dict[str, list[Plan]] = {str({}): [plan]}
    best: tuple[Values, Plan] | None = None
    for _ in range(TRIES):
        limit = plan.seconds if best is None else best[1].seconds
        fitting = (c for c in candidates if c.seconds < limit and _foreseen(plan, c, traced) <= plan.usable)
        chosen = next(fitting, None)
        if chosen is None:
            break
        candidates.remove(chosen)
        say(f"trying {named(plan, chosen.all_values)}")
        try:
            config = changed_config(plan.settled.config, chosen.all_values)
            made = make_plan(config, plan.settled.gpus, plan.settled.hardware, plan.mfu)
        except UsageError:
            continue
        traced.setdefault(str(chosen.values), []).append(made)
        if made.fits and made.seconds < limit:
            best = chosen.all_values, made
    return best


def _candidates(plan: Plan, kinds: Iterable[Values]) -> Iterator[_Candidate]:
    settled = plan.settled
    rows = settled.config.rows_per_step // settled.gpus
    for values in kinds:
        for micro in (n for n in range(1, rows + 1) if rows % n == 0):
            if not values and micro <= settled.micro_rows:
                continue
            config = changed_config(settled.config, {**values, "batch.micro": micro})
            recompute = values.get("compute.recompute", settled.choices.recompute.value)
            choices = replace(
                settled.choices,
                micro_rows=Choice(str(micro), "tried"),
                recompute=Choice(str(recompute), "tried"),
            )
            changed = replace(settled, config=config, choices=choices)
            bill = bill_of(changed, plan.size, plan.bill.outside, plan.flops_per_token)
            yield _Candidate(values, micro, changed, step_seconds(changed, bill))


def _foreseen(plan: Plan, candidate: _Candidate, traced: dict[str, list[Plan]]) -> float:
    """Bytes at the peak, which are close to a straight line over the rows: through two traces with the same other values;
    from one, with activations and working memory in proportion; from the plan's with the estimates of both."""
    known = traced.get(str(candidate.values), [])
    if len(known) > 1:
        a, b = known[-2:]
        slope = (b.memory.peak - a.memory.peak) / (b.settled.micro_rows - a.settled.micro_rows)
        return b.memory.peak + slope * (candidate.micro - b.settled.micro_rows)
    near = known[0] if known else plan
    parts, settled, changed = near.memory.at_peak, near.settled, candidate.settled
    moving = float(parts["activations"] + parts["working memory"])
    held = float(sum(parts[name] for name in HELD))
    still = near.memory.peak - moving - held
    moving *= activation_bytes(settled.model, changed.choices) / activation_bytes(settled.model, settled.choices)
    held *= _share(changed) / _share(settled)
    if settled.config.compute.fsdp.reshard and not changed.config.compute.fsdp.reshard:
        still += plan.bill.width * plan.size.total
    return still + held + moving * candidate.micro / settled.micro_rows


def _share(settled: Settled) -> float:
    """Of the model's states that one GPU holds."""
    shard = settled.config.compute.fsdp.shard
    return 1 / (settled.gpus if shard == "all" else shard)
