"""Runs of a table of bigrams of which it is known what leaving documents out is worth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from scale.config.optim import OptimConfig, ScheduleConfig, SpikeConfig
from scale.config.predict import PredictConfig
from scale.data.planner import Planner
from scale.data.rows import RowReader
from scale.data.source import PackedSource
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.parallel.ranks import Ranks
from scale.parallel.single import Single
from scale.predict.selection.selector import make_selector
from scale.predict.stepper import PredictiveStepper
from scale.train.step import BackwardStepper, StepSettings
from tests.data.test_rows import InMemory

V = 32
LENGTH = 33
STEPS = 420
QUIET = {
    "enabled": True, "warmup": 10, "min_full": 10**6, "directions": ["optimizer"], "confidence": 0,
    "world": {"members": 1, "hidden": 4, "latent": 2, "train_every": 10**6, "paths": 1},
}  # fmt: skip
"""No jump, and a world model that is never trained."""


class Bigrams(nn.Module):
    """Logits of the next token are a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(V, V, bias=False)
        nn.init.zeros_(self.table.weight)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(nn.functional.one_hot(input_ids, V).float()))


def documents(other: str) -> InMemory:
    """Half of them follow a grammar: mostly one token after each. The others say nothing new after a few steps
    ("trivial"), or can never be foreseen ("noise")."""
    rng = np.random.default_rng(0)
    after, docs = np.random.default_rng(99).permutation(np.arange(2, V)), []
    for i in range(512):
        ids = [int(rng.integers(2, V))]
        for _ in range(LENGTH - 1):
            known = int(after[ids[-1] - 2]) if rng.random() < 0.9 else int(rng.integers(2, V))
            ids.append(known if i % 2 else int(rng.integers(2, V)))
        docs.append([1] * LENGTH if other == "trivial" and i % 2 == 0 else ids)
    return InMemory(docs)


class Run:
    """Steps of 16 rows. Windows are to be made small by who runs it."""

    def __init__(self, other: str, ranks: Ranks | None = None, steps: int = STEPS, workers: int = 0, **predict: Any):
        self.ranks = ranks or Ranks()
        selection = {"kind": "history", "control": "bandit", "episode": 10, "warmup": 0} | predict.pop("selection", {})
        config = PredictConfig.model_validate(QUIET | {"guard": {"relax": 2}, "selection": selection} | predict)
        docs = documents(other)
        planner = Planner([docs.lengths], [1.0], 16 * 32, lambda _: 32, 32, seed=3)
        planner.selector = make_selector(config.selection, planner.documents, workers, self.ranks)
        self.source = PackedSource(
            planner, RowReader([docs]), ["all"], 16 * 32, [32], self.ranks.rank, self.ranks.world_size, workers,
            all_sum=self.ranks.all_sum,
        )  # fmt: skip
        strategy, objective = Single("cpu"), CausalLM(per_document=True)
        strategy.ranks = self.ranks
        # so large an eps makes AdamW gradient descent, under which a batch that teaches twice as much is twice as fast
        optim = OptimConfig(lr=10.0, eps=10.0, betas=(0.0, 0.0), weight_decay=0.0, clip=0.0)
        self.root = strategy.prepare(Root(Bigrams(), objective), optim, None)
        schedule = ScheduleConfig(kind="constant", warmup=0)
        settings = StepSettings(steps=steps, lr=10.0, schedule=schedule, spike=SpikeConfig(), clip=0.0)
        self.stepper = PredictiveStepper(
            BackwardStepper(self.root, objective, strategy, settings, lambda kind, text: None), config
        )
        self.rows: list[dict[str, Any]] = []

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            report = self.stepper.step(self.source)
            self.rows.append({"loss": report.loss, "forwards": report.forward_passes, "drawn": self.source.share()}
                             | report.prediction)  # fmt: skip
        return self

    def decided(self) -> list[tuple[int, float, float | None]]:
        """Step, share and mean reward of each decision."""
        return [(n + 1, row["share"], row.get("share_reward")) for n, row in enumerate(self.rows) if "share" in row]
