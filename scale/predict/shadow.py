"""Predicted weights that training never sees: the best ones found so far, kept beside it, checked and exported."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scale.protocols import Strategy


class Shadow:
    """A copy of the weights a jump led to, wherever their check loss is the lowest of all and below training's own."""

    KEY = "shadow.weights"

    def __init__(self, strategy: Strategy):
        self.strategy = strategy
        self.weights: dict[str, Tensor] = {}
        self.loss, self.step = math.inf, 0

    def offer(self, step: int, loss: float) -> bool:
        """Keep the present weights if their check loss is the lowest so far. Says whether they were kept."""
        if not loss < self.loss:
            return False
        self.loss, self.step = loss, step
        with self.strategy.edit_masters() as shards:
            if not self.weights:
                self.weights = {name: torch.empty_like(shard.param) for name, shard in shards.items()}
            for name, shard in shards.items():
                self.weights[name].copy_(shard.param)
        return True

    def companions(self) -> dict[str, dict[str, Tensor]]:
        """For checkpoints: `predict/shadow.weights/NAME`, which `scale export --shadow` reads."""
        return {self.KEY: self.weights} if self.weights else {}

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss if self.weights else None, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes room for the weights, which the stepper reads back."""
        self.loss, self.step, self.weights = math.inf, state["step"], {}
        if state["loss"] is not None:
            self.offer(state["step"], state["loss"])
