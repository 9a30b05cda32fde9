"""Checks of a jump: forward passes on fixed batches that were held back, between parts of the jump."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from scale.config.predict import GuardConfig
from scale.parallel.ranks import Ranks
from scale.predict.packing import pack, unpack
from scale.predict.weights.jump import Jump
from scale.protocols import Batch, Group, Source


@dataclass
class Kept:
    """What was kept of a jump: the check loss after it, its steps kept and taken back, and the forwards it took."""

    after: float
    steps: int = 0
    rejected: int = 0
    forwards: int = 0
    parts: list[list[float]] = field(default_factory=list)
    """Coefficients of the parts that were kept, (parts, G)."""
    why: str = ""
    """What ended it before its horizon."""


class CheckBatches:
    """The fixed batches. They are drawn from the training stream once, on first use, and held back: not trained on in that
    pass over the data (where documents come again, so do theirs)."""

    def __init__(self, score: Callable[[Group], float], ranks: Ranks, tokens: int = 0):
        self.score, self.ranks, self.tokens = score, ranks, tokens
        self.group: Group | None = None
        self.drawn = 0

    def draw(self, source: Source) -> None:
        """Take the batches, if there are none yet: one step's, or as many steps' as hold the tokens wanted."""
        if self.group is not None:
            return
        batches: list[Batch] = []
        tokens = 0
        while not batches or tokens < self.tokens:
            group = source.draw()
            batches += [{name: tensor.clone() for name, tensor in batch.items()} for batch in group.batches]
            tokens += group.tokens
            self.drawn += 1
        self.group = Group(batches, tokens)

    def loss(self) -> float:
        """Mean loss of the current weights over all ranks' batches; the same bits on every rank."""
        assert self.group is not None, "drawn before it is used"
        return self.score(self.group)

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks, as the state of rank 0 is the one that is kept. Collective."""
        if self.group is None:
            return {"drawn": 0}
        mine = [{name: pack(tensor) for name, tensor in batch.items()} for batch in self.group.batches]
        return {"drawn": self.drawn, "tokens": self.group.tokens, "batches": self.ranks.gather(mine)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """With another number of ranks the batches are dealt out anew, as many to each rank, for their forward passes meet:
        where that does not come out even every batch is there the same number of times, which leaves the mean as it is."""
        self.drawn, self.group = state["drawn"], None
        if "batches" not in state:
            return
        by_rank, world_size, times = state["batches"], self.ranks.world_size, 1
        if len(by_rank) != world_size:
            every = [batch for batches in by_rank for batch in batches]
            times = world_size // math.gcd(len(every), world_size)
            by_rank = [(times * every)[rank::world_size] for rank in range(world_size)]
        mine: list[Batch] = [
            {name: unpack(packed) for name, packed in batch.items()} for batch in by_rank[self.ranks.rank]
        ]
        self.group = Group(mine, times * state["tokens"])


def jump_in_parts(
    jump: Jump,
    vectors: Sequence[Tensor],
    reach_KG: Sequence[Sequence[float]],
    guard: GuardConfig,
    before: float,
    check: Callable[[], float],
    seed: int,
    factor_P: Sequence[float] | None = None,
) -> Kept:
    """Move along a direction part by part for as long as the check loss falls, at most K steps.

    `reach_KG`: coefficients up to each step. A part that does not lower the loss (with a tolerance: that raises it by more
    than that share of `before`), or leaves the allowed drift, is taken back; it is tried once more at half its length, and
    then the jump ends. What was kept is made again from the snapshot, so that the weights are the same bits as if the
    rejected part had never been.
    """
    kept, interval, shrunk = Kept(before), float(guard.correction_interval), False
    while kept.steps < len(reach_KG):
        steps = min(round(interval), len(reach_KG) - kept.steps)
        start_G = reach_KG[kept.steps - 1] if kept.steps else [0.0] * len(reach_KG[0])
        c_G = [b - a for a, b in zip(start_G, reach_KG[kept.steps + steps - 1], strict=True)]
        jump.apply(vectors, c_G, seed + len(kept.parts), factor_P)
        loss = check()
        kept.forwards += 1
        limit = min(kept.after, before) + guard.tolerance * abs(before)
        if math.isfinite(loss) and loss < limit and jump.drift() <= guard.drift:
            kept.after, kept.steps = loss, kept.steps + steps
            kept.parts.append(c_G)
            interval *= 1 if shrunk else guard.growth
            continue
        kept.rejected += steps
        kept.why = "not finite" if not math.isfinite(loss) else "loss" if loss >= limit else "drift"
        jump.rollback()
        for i, part_G in enumerate(kept.parts):
            jump.apply(vectors, part_G, seed + i, factor_P)
        if shrunk or steps == 1:
            break
        interval, shrunk = steps // 2, True
    return kept
