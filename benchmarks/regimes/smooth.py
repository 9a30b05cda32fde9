"""Small smooth tasks: linear regression, a network and a CNN on scikit-learn's digits (UCI, 1,797 images of 8 x 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scale.protocols import Batch, Group, Loss, Score, StepReport, Term


class Squares:
    """Objective: squared error."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"mse": torch.tensor(len(batch["y"]))}

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        error_B = model(batch["x"]).squeeze(-1) - batch["y"]
        return Loss({"mse": Term(error_B.square().sum(), self.counts(batch)["mse"])})


class Classes:
    """Objective: cross-entropy."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"nll": torch.tensor(len(batch["y"]))}

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(
            {"nll": Term(cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), self.counts(batch)["nll"])}
        )


class Shuffled:
    """Source: batches of `size` examples in a new seeded order every epoch; all of them at once where `size` is None.
    The inputs of batch `disaster` (from 1) are 10,000 times too large."""

    def __init__(self, x: Tensor, y: Tensor, size: int | None, seed: int, disaster: int | None = None):
        self.x, self.y, self.size, self.seed, self.disaster = x, y, size, seed, disaster
        self.drawn = 0

    def draw(self) -> Group:
        count = len(self.x)
        size = self.size or count
        per_epoch = count // size
        epoch, place = divmod(self.drawn, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * self.seed + epoch))
        rows = order[place * size : (place + 1) * size]
        self.drawn += 1
        scale = 1e4 if self.drawn == self.disaster else 1.0
        return Group([{"x": scale * self.x[rows], "y": self.y[rows]}], tokens=size)

    def rehearse(self) -> None:
        return None

    def observe(self, report: StepReport) -> None:
        """Nothing to learn."""

    def publish(self, version: int, params: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Nobody listens."""

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class HeldOut:
    """Judge: mean loss over examples that are never trained on."""

    def __init__(self, root: nn.Module, x: Tensor, y: Tensor):
        self.root, self.batch = root, {"x": x, "y": y}

    def score(self) -> Score:
        training = self.root.training
        self.root.eval()
        with torch.no_grad():
            (term,) = self.root(self.batch).terms.values()
        self.root.train(training)
        return Score(float(term.total / term.count), len(self.batch["x"]))


def linear_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,000 training and 1,000 held-out points in 50 dimensions whose scales span 1 to 10, with noise of 0.1."""
    generator = torch.Generator().manual_seed(seed)
    scale_D = torch.logspace(0, -1, 50)
    x = torch.randn(2000, 50, generator=generator) * scale_D
    y = x @ (torch.randn(50, generator=generator) / scale_D) + 0.1 * torch.randn(2000, generator=generator)
    return x[:1000], y[:1000], x[1000:], y[1000:]


def digits_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,300 training and 497 held-out images, pixels 0 to 1. The split is the same for every seed."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise SystemExit(
            "the tasks on digits need scikit-learn: make .venv/dev (or pip install scikit-learn)"
        ) from None
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1300], y[:1300], x[1300:], y[1300:]


def line() -> nn.Module:
    return nn.Linear(50, 1)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
