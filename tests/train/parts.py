"""Small real parts for tests of the stepper, the loop and the trainer: a regression network and a stream of numbers."""

from __future__ import annotations

import torch
from torch import nn

from scale.config.optim import OptimConfig, ScheduleConfig, SpikeConfig
from scale.objectives.root import Root
from scale.parallel.single import Single
from scale.protocols import Group, Loss, Term
from scale.train.step import BackwardStepper, StepSettings


class Squares:
    """Objective: summed squared error; also reports the mean prediction as a metric."""

    def counts(self, batch):
        return {"mse": torch.tensor(batch["y"].numel())}

    def __call__(self, model, batch):
        out = model(batch["x"])
        count = torch.tensor(out.numel())
        return Loss({"mse": Term((out - batch["y"]).square().sum(), count)}, {"mean": Term(out.sum(), count)})


class Numbers:
    """Source: noisy linear data, a pure function of (seed, groups drawn). `damage` maps a group to a changed batch."""

    def __init__(self, rows=16, micro=16, damage=None):
        self.rows, self.micro, self.damage, self.drawn = rows, micro, damage or {}, 0

    def draw(self):
        rng = torch.Generator().manual_seed(self.drawn)
        x = torch.randn(self.rows, 4, generator=rng)
        y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]) + 0.1 * torch.randn(self.rows, 1, generator=rng)
        batch = self.damage.get(self.drawn, lambda b: b)({"x": x, "y": y})
        self.drawn += 1
        batches = [{k: v[i : i + self.micro] for k, v in batch.items()} for i in range(0, self.rows, self.micro)]
        return Group(batches, tokens=self.rows)

    def rehearse(self):
        return None

    def observe(self, report):
        pass

    def publish(self, version, params):
        pass

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))


def stepper(model=None, objective=None, steps=100, optim=None, **settings):
    strategy = Single()
    objective = objective or Squares()
    optim = optim or OptimConfig(lr=0.05, weight_decay=0.0)
    root = strategy.prepare(Root(model if model is not None else network(), objective), optim, None)
    settings = {"schedule": ScheduleConfig(kind="constant", warmup=0), "spike": SpikeConfig(), "clip": 1.0} | settings
    events = []
    made = BackwardStepper(
        root,
        objective,
        strategy,
        StepSettings(steps=steps, lr=optim.lr, **settings),
        lambda kind, text: events.append(kind),
    )
    made.events = events
    return made
