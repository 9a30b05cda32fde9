"""What prediction has to beat: cheap ways to use the weights of the last steps, each a stepper around the full one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor

from scale.protocols import Source, StepReport
from scale.train.step import BackwardStepper


class Around:
    """Does what the full stepper does."""

    def __init__(self, full: BackwardStepper):
        self.full = full

    def rehearse(self, source: Source) -> None:
        self.full.rehearse(source)

    def step(self, source: Source) -> StepReport:
        report = self.full.step(source)
        with self.full.strategy.edit_masters() as shards:
            self.moved(report, [shard.param for shard in shards.values()])
        return report

    def moved(self, report: StepReport, params: list[Tensor]) -> None:
        """A step was made; change `params` in place."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def blank(self, saved: Mapping[str, Size]) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Benchmark runs are not resumed in the middle."""

    def state_dict(self) -> dict[str, Any]:
        return self.full.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.full.load_state_dict(state)


class TailMean(Around):
    """The mean of the weights of the last `share` of the run (as LAWA, arXiv 2209.14981), taken over at the last step."""

    def __init__(self, full: BackwardStepper, share: float):
        super().__init__(full)
        self.first = round((1 - share) * full.settings.steps)
        self.mean: list[Tensor] = []

    def moved(self, report: StepReport, params: list[Tensor]) -> None:
        if report.step <= self.first:
            return
        count = report.step - self.first
        if not self.mean:
            self.mean = [param.clone() for param in params]
        torch._foreach_lerp_(self.mean, params, 1 / count)
        if report.step == self.full.settings.steps:
            torch._foreach_copy_(params, self.mean)


class OuterNesterov(Around):
    """Every `every` steps the displacement since the last time is a gradient for Nesterov momentum (SNOO, DiLoCo)."""

    def __init__(self, full: BackwardStepper, every: int, momentum: float):
        super().__init__(full)
        self.every, self.momentum = every, momentum
        self.anchor: list[Tensor] = []
        self.velocity: list[Tensor] = []

    def moved(self, report: StepReport, params: list[Tensor]) -> None:
        if not self.anchor:
            self.anchor = [param.clone() for param in params]
            self.velocity = [torch.zeros_like(param) for param in params]
        elif report.step % self.every == 0:
            moved = torch._foreach_sub(params, self.anchor)
            torch._foreach_mul_(self.velocity, self.momentum)
            torch._foreach_add_(self.velocity, moved)
            torch._foreach_add_(self.anchor, moved)
            torch._foreach_add_(self.anchor, self.velocity, alpha=self.momentum)
            torch._foreach_copy_(params, self.anchor)


class EmaNesterov(Around):
    """Gradients are taken `look_ahead` x the smoothed displacement of a step ahead of the weights; the look-ahead is taken
    back at the end (modded-nanogpt, track 3)."""

    def __init__(self, full: BackwardStepper, look_ahead: float, decay: float):
        super().__init__(full)
        self.look_ahead, self.decay = look_ahead, decay
        self.base: list[Tensor] = []
        self.drift: list[Tensor] = []

    def moved(self, report: StepReport, params: list[Tensor]) -> None:
        if not self.base:
            self.base = [param.clone() for param in params]
            self.drift = [torch.zeros_like(param) for param in params]
            self.ahead = [param.clone() for param in params]
            return
        moved = torch._foreach_sub(params, self.ahead)
        torch._foreach_add_(self.base, moved)
        torch._foreach_lerp_(self.drift, moved, 1 - self.decay)
        factor = self.look_ahead * self.full.factor(report.step)
        self.ahead = list(torch._foreach_add(self.base, self.drift, alpha=factor))
        torch._foreach_copy_(params, self.base if report.step == self.full.settings.steps else self.ahead)
