"""The module that strategies wrap: its forward is the objective, so that sharding hooks fire around all of it."""

from __future__ import annotations

from torch import nn

from scale.protocols import Batch, Loss, Objective


class Root(nn.Module):
    """`root(batch)` is `objective(model, batch)`."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> Loss:
        return self.objective(self.model, batch)
