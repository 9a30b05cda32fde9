"""The module that strategies wrap: its forward is the objective, so that sharding hooks fire around all of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.utils._pytree import register_dataclass

from scale.protocols import Batch, Loss, Objective, Term

for _kind in (Term, Loss):  # hooks of FSDP look for an output's tensors as a pytree; before torch 2.13 nowhere else
    register_dataclass(_kind)


class Root(nn.Module):
    """`root(batch)` is `objective(model, batch)`."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> Loss:
        return self.objective(self.model, batch)

    def called(self) -> nn.Module:
        """The module that the objective calls, so that it can be compiled: the model, or a part of it named by `called`."""
        part: Callable[[nn.Module], nn.Module] | None = getattr(self.objective, "called", None)
        return part(self.model) if part is not None else self.model
