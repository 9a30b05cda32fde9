"""A process of which the truth is known: loss falls at a rate that the learning rate decides, under noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from scale.predict.features import FeatureEncoder
from scale.predict.kinds import KINDS
from scale.predict.moments import MadeStep, Moment, Statistics
from scale.predict.signals import Signals


def made(
    step: int, loss: float, grad_norm: float, lr_factor: float, position: float, tokens: int = 1000, seq_len: int = 64
) -> MadeStep:
    """A full step."""
    return MadeStep(
        step=step,
        loss=loss,
        grad_norm=grad_norm,
        lr_factor=lr_factor,
        position=position,
        tokens=tokens,
        seq_len=seq_len,
    )


@dataclass
class Planted:
    """loss = floor + gap + noise, gap *= 1 - rate * lr_factor; lr alternates between two values every `period`."""

    steps: int
    seed: int = 0
    rate: float = 0.002
    noise: float = 0.03
    period: int = 60
    floor: float = 1.0
    gap: float = 3.0
    truth: list[float] = field(default_factory=list)

    def lr_factor(self, step: int) -> float:
        return 1.0 if step // self.period % 2 == 0 else 0.1

    def facts(self) -> Iterator[MadeStep]:
        rng, gap = np.random.default_rng(self.seed), self.gap
        for step in range(1, self.steps + 1):
            lr = self.lr_factor(step)
            gap *= 1 - self.rate * lr
            self.truth.append(self.floor + gap)
            loss = self.floor + gap + self.noise * rng.standard_normal()
            grad = math.exp(0.3 * gap + 0.1 * rng.standard_normal())
            seq_len = 64 if step < self.steps // 2 else 128
            yield made(step, loss, grad, lr, step / self.steps, 1000 + int(rng.integers(100)), seq_len)


def stats(step: int, seed: int = 0) -> Statistics:
    """Sums over made-up weights of every kind, as the encoder would find them."""
    rng = np.random.default_rng([seed, step])
    table_GC = np.zeros((len(KINDS), 12))
    for kind in range(len(KINDS)):
        p, g, d, u = rng.standard_normal((4, 50)) * np.array([[1.0], [0.1], [0.01], [0.01]]) * (1 + kind)
        pairs = ((p, p), (p, g), (p, d), (p, u), (g, g), (g, d), (g, u), (d, d), (d, u), (u, u))
        table_GC[kind, :10] = [a @ b for a, b in pairs]
        table_GC[kind, 10] = abs(g).max()
    return Statistics(step, table_GC, np.full(len(KINDS), 50))


def moments(process: Planted, sigma: float = 4.0, shuffle: int | None = None) -> Iterator[Moment]:
    """The process as the world model meets it; `shuffle`: features of each moment in an order of their own."""
    signals, encoder = Signals(sigma), FeatureEncoder()
    rng = None if shuffle is None else np.random.default_rng(shuffle)
    for facts in process.facts():
        features_F = encoder.features(signals, facts, None)
        if rng is not None:
            features_F = [features_F[i] for i in rng.permutation(len(features_F))]
        yield signals.moment(facts, features_F, [facts.lr_factor, 0.0, 0.0])
        signals.update(facts)
