"""A straight line through the past of every weight, followed where it fits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scale.parallel.ranks import Ranks
from scale.predict.weights.directions.kept import Numbers, like, zero
from scale.predict.weights.runs import runs
from scale.protocols import Shards

DECAY = 0.98
"""What is left of a look's weight after a step."""
LEAST_LOOKS = 10
LEAST_FIT = 0.95
"""R^2 from which a weight counts as moving along its line."""
_SMALLEST = 2.0**-30


class MaskedSlope(Numbers):
    """Exponentially weighted least squares of each weight on time; slopes of weights with R^2 over 0.95, else 0.

    Means and (co)variances are updated as in West, "Updating mean and variance estimates" (CACM 1979). Sums are kept
    divided by `scale`, which shrinks with every step: old ones fade without being touched.
    """

    name = "masked_slope"
    copies = 3
    NUMBERS = ("looks", "weight", "scale", "time", "time_mean", "time_spread")

    def __init__(self, shards: Shards, ranks: Ranks) -> None:
        self.mean, self.cross, self.spread = like(shards), like(shards), like(shards)
        self.looks, self.weight, self.scale = 0, 0.0, 1.0
        self.time, self.time_mean, self.time_spread = 0.0, 0.0, 0.0

    def observe(self, params: Sequence[Tensor], update: Sequence[Tensor] | None, steps: int, lr: float) -> None:
        if update is None:
            self.restart()
        fade, self.time, self.looks = DECAY**steps, self.time + lr, self.looks + 1
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
        zero(self.tensors().values())
        self.looks, self.weight, self.scale = 0, 0.0, 1.0
        self.time, self.time_mean, self.time_spread = 0.0, 0.0, 0.0

    def vectors(self) -> list[Tensor] | None:
        if self.looks < LEAST_LOOKS:
            return None
        slopes = list(torch._foreach_mul(self.cross, self.scale / self.time_spread))
        for run in runs(slopes):  # R^2 = cross^2 / (spread of time x spread) > least
            over = torch._foreach_mul(slopes[run], self.cross[run])
            torch._foreach_add_(over, self.spread[run], alpha=-LEAST_FIT)
            torch._foreach_clamp_min_(over, 0.0)
            torch._foreach_sign_(over)
            torch._foreach_mul_(slopes[run], over)
        return slopes

    def smoothed(self) -> list[Tensor]:
        """The weighted mean of each weight over the looks: an average of models along the way."""
        return self.mean

    def tensors(self) -> dict[str, Sequence[Tensor]]:
        return {"mean": self.mean, "cross": self.cross, "spread": self.spread}
