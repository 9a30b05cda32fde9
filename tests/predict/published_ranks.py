"""What a source is given as new weights while a predictive stepper moves them, in each rank."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from scale.train.loop import Loop, LoopSettings
from scale.train.stop import StopSignal
from tests.parallel.lm import Rows
from tests.predict.extrapolation_ranks import EXTRAPOLATING
from tests.predict.jump_ranks import STEPS, Run


class Listens(Rows):
    """Compares what is published with what the next forward passes read."""

    def __init__(self, ranks, strategy):
        super().__init__(ranks.rank, ranks.world_size)
        self.strategy, self.versions, self.stale, self.moved, self.before = strategy, [], [], [], {}

    def publish(self, version, params):
        heard = {name: param.detach().clone() for name, param in params()}
        self.versions.append(version)
        self.before, before = heard, self.before
        self.moved.append(_distance(heard, before) if before else 0.0)

    def observe(self, report):
        """Heard right after: nothing may have moved the weights since."""
        self.stale.append(_distance(self.before, dict(self.strategy.full_params())))

    def draw(self):
        """The weights of the step to come are those that were published last."""
        if self.versions:
            self.stale.append(_distance(self.before, dict(self.strategy.full_params())))
        return super().draw()


def _distance(one, two):
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def published(ranks, kind, extrapolation):
    run = Run(ranks, kind, **({"mode": "always"} | (EXTRAPOLATING if extrapolation else {})))
    source = Listens(ranks, run.strategy)
    kinds = []
    record = SimpleNamespace(step=lambda report, score: kinds.append(report.kind), event=print)
    settings = LoopSettings(steps=STEPS, eval_every=STEPS, save_every=STEPS)
    Loop(run.stepper, source, settings, record, lambda *_: None, lambda: None, params=run.strategy.full_params).run(
        StopSignal(ranks)
    )
    torch.manual_seed(0)
    return {"versions": source.versions, "stale": max(source.stale), "moved": source.moved, "kinds": kinds}
