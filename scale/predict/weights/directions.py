"""Where weights are heading: the smoothed update, the last update, and the slopes of weights that move along a line.

Lists hold one fp32 tensor per local shard, in the shards' order. Time is counted in steps x lr factor, so that a schedule
does not look like a change of direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from scale.config.predict import DirectionName
from scale.predict.weights.runs import runs
from scale.protocols import Shards

DECAY = 0.95
"""What is left of an update's weight in the smoothed update after a step."""
SLOPE_DECAY = 0.98
LEAST_SEEN = 10
"""Statistics before a slope is known."""
LEAST_FIT = 0.95
"""R^2 from which a weight counts as moving along its line."""
_SMALLEST = 2.0**-30


def like(shards: Shards) -> list[Tensor]:
    """Zeros in the shapes of the local shards."""
    return [torch.zeros_like(shard.param.detach(), dtype=torch.float32) for shard in shards.values()]


class Kept:
    """State of a checkpoint: the attributes named in `NUMBERS`, and the lists of `tensors`."""

    NUMBERS: ClassVar[tuple[str, ...]] = ()

    def tensors(self) -> dict[str, Sequence[Tensor]]:
        """All that is kept in the shape of shards: checkpoints save it and read it back in place."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.NUMBERS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.NUMBERS:
            setattr(self, name, state[name])


class Direction(Kept):
    """Follows the weights. Memory is taken when it is made and never grows."""

    copies: ClassVar[int]
    """fp32 copies of the local shards that are kept."""

    def __init__(self, shards: Shards) -> None: ...

    def observe(self, params: Sequence[Tensor], update: Sequence[Tensor] | None, steps: int, lr: float) -> None:
        """`steps` and the sum `lr` > 0 of their lr factors lie since the statistics before; `update` is what the weights
        moved since then, divided by `lr`. None where there was nothing before: at first and after `restart`, with 0 and 0.
        Neither list may be written or kept."""
        raise NotImplementedError

    def restart(self) -> None:
        """The weights were moved by something that was not training."""

    def vectors(self) -> Sequence[Tensor] | None:
        """Displacement per step at lr factor 1, not to be written; None while too little was seen."""
        raise NotImplementedError


class SmoothedUpdate(Direction):
    """Exponential average of updates, bias-corrected as in Adam (arXiv 1412.6980). A jump leaves it as it is."""

    copies = 1
    NUMBERS = ("mass",)

    def __init__(self, shards: Shards) -> None:
        self.mean, self.mass = like(shards), 0.0

    def observe(self, params: Sequence[Tensor], update: Sequence[Tensor] | None, steps: int, lr: float) -> None:
        if update is None:
            return
        new = 1 - DECAY**steps
        self.mass = DECAY**steps * self.mass + new
        torch._foreach_lerp_(self.mean, list(update), new / self.mass)

    def vectors(self) -> list[Tensor] | None:
        return self.mean if self.mass else None

    def tensors(self) -> dict[str, Sequence[Tensor]]:
        return {"mean": self.mean}


class LastUpdate(Direction):
    """What the optimizer did since the statistics before."""

    copies = 1
    NUMBERS = ("seen",)

    def __init__(self, shards: Shards) -> None:
        self.last, self.seen = like(shards), False

    def observe(self, params: Sequence[Tensor], update: Sequence[Tensor] | None, steps: int, lr: float) -> None:
        if update is not None:
            torch._foreach_copy_(self.last, list(update))
            self.seen = True

    def restart(self) -> None:
        self.seen = False

    def vectors(self) -> list[Tensor] | None:
        return self.last if self.seen else None

    def tensors(self) -> dict[str, Sequence[Tensor]]:
        return {"last": self.last}


class MaskedSlope(Direction):
    """Exponentially weighted least squares of each weight on time; slopes of weights with R^2 over 0.95, else 0.

    Means and (co)variances are updated as in West, "Updating mean and variance estimates" (CACM 1979). Sums are kept
    divided by `scale`, which shrinks with every step: old ones fade without being touched.
    """

    copies = 3
    NUMBERS = ("seen", "weight", "scale", "time", "time_mean", "time_spread")

    def __init__(self, shards: Shards) -> None:
        self.mean, self.cross, self.spread = like(shards), like(shards), like(shards)
        self.seen, self.weight, self.scale = 0, 0.0, 1.0
        self.time, self.time_mean, self.time_spread = 0.0, 0.0, 0.0

    def observe(self, params: Sequence[Tensor], update: Sequence[Tensor] | None, steps: int, lr: float) -> None:
        if update is None:
            self.restart()
        fade, self.time, self.seen = SLOPE_DECAY**steps, self.time + lr, self.seen + 1
        old = fade * self.weight
        self.weight, self.scale = old + 1, self.scale * fade
        share, ahead = old / self.weight, self.time - self.time_mean
        self.time_mean += ahead / self.weight
        self.time_spread = fade * self.time_spread + share * ahead**2
        if self.scale < _SMALLEST:
            torch._foreach_mul_(self.cross + self.spread, self.scale)
            self.scale = 1.0
        for run in runs(params):
            away = torch._foreach_sub(list(params[run]), self.mean[run])
            torch._foreach_add_(self.mean[run], away, alpha=1 / self.weight)
            torch._foreach_add_(self.cross[run], away, alpha=share * ahead / self.scale)
            torch._foreach_addcmul_(self.spread[run], away, away, value=share / self.scale)

    def restart(self) -> None:
        _zero(self.tensors().values())
        self.seen, self.weight, self.scale = 0, 0.0, 1.0
        self.time, self.time_mean, self.time_spread = 0.0, 0.0, 0.0

    def vectors(self) -> list[Tensor] | None:
        if self.seen < LEAST_SEEN:
            return None
        slopes = list(torch._foreach_mul(self.cross, self.scale / self.time_spread))
        for run in runs(slopes):  # R^2 = cross^2 / (spread of time x spread) > least
            over = torch._foreach_mul(slopes[run], self.cross[run])
            torch._foreach_add_(over, self.spread[run], alpha=-LEAST_FIT)
            torch._foreach_clamp_min_(over, 0.0)
            torch._foreach_sign_(over)
            torch._foreach_mul_(slopes[run], over)
        return slopes

    def tensors(self) -> dict[str, Sequence[Tensor]]:
        return {"mean": self.mean, "cross": self.cross, "spread": self.spread}


DIRECTIONS: dict[DirectionName, type[Direction]] = {"optimizer": LastUpdate, "masked_slope": MaskedSlope}


def _zero(lists: Iterable[Sequence[Tensor]]) -> None:
    for tensors in lists:
        torch._foreach_zero_(list(tensors))
