"""What the world model's inputs cost: the 64 features before a step, and the running statistics they are made of.

The peer is numpy written plainly: every number anew in every call. Both must agree to `CLOSE` (standard deviations of a
feature in fp64; sums are taken in another order) in every step of a made-up run with a look at the weights every few steps; a
round is one such run, and its figure the mean of all calls after the first 150, in CPU time, because a run is so short that
being interrupted once would double it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.common import Row, summarise
from scale.errors import ScaleError
from scale.predict.features import CLIP, FIXED, NAMES, WIDEST, Coming, FeatureEncoder
from scale.predict.groups import KINDS
from scale.predict.moments import GroupStats, StepFacts
from scale.predict.signals import TINY, Signals

CLOSE = 1e-9
FIRST, STEPS = 150, 450
"""Steps that are not timed, in which the longest window fills; all steps of a run."""
Encode = Callable[[Signals, Coming, GroupStats | None], list[float]]
Pair = tuple[Signals, Encode]


class PlainSignals(Signals):
    """Losses in a list, lines through a copy of it."""

    def __init__(self, sigma: float):
        super().__init__(sigma)
        self.losses: list[float] = []

    def update(self, facts: StepFacts) -> None:
        super().update(facts)
        if not facts.skipped and math.isfinite(facts.loss) and math.isfinite(facts.grad_norm):
            self.losses = [*self.losses, facts.loss][-128:]

    def slope(self, scale: int) -> float:
        return _line(self.losses[-scale:])[0]

    @property
    def oscillation(self) -> float:
        left_N = _line(self.losses[-32:])[1]
        return float(np.mean(left_N[1:] * left_N[:-1] < 0)) if len(left_N) > 1 else 0.0


class PlainEncoder:
    """The formulas of `FeatureEncoder`, one expression each."""

    def __init__(self) -> None:
        self.count_F, self.mean_F, self.spread_F = np.zeros((3, len(NAMES)))
        self.centre_F, self.scale_F = np.array([FIXED.get(name, (math.nan, math.nan)) for name in NAMES]).T

    def features(self, signals: Signals, coming: Coming, stats: GroupStats | None) -> list[float]:
        raw_F = np.array([*_global(signals, coming), *_kinds(stats, signals.last_lr)])
        known_F, online_F = np.isfinite(raw_F), np.isnan(self.centre_F)
        raw_F = np.clip(np.where(known_F, raw_F, 0.0), -WIDEST, WIDEST)
        self.count_F += known_F
        before_F = raw_F - self.mean_F
        self.mean_F += np.where(known_F, before_F / np.maximum(self.count_F, 1), 0.0)
        self.spread_F += np.where(known_F, before_F * (raw_F - self.mean_F), 0.0)
        deviation_F = np.sqrt(self.spread_F / np.maximum(self.count_F - 1, 1))
        centre_F = np.where(online_F, self.mean_F, self.centre_F)
        scale_F = np.where(online_F, np.maximum(deviation_F, 1e-6), self.scale_F)
        usable_F = known_F & ((self.count_F > 1) | ~online_F)
        return np.clip(np.where(usable_F, (raw_F - centre_F) / scale_F, 0.0), -CLIP, CLIP).tolist()


def _line(values: list[float]) -> tuple[float, np.ndarray]:
    y_N = np.asarray(values, np.float64)
    if len(y_N) < 3:
        return 0.0, np.zeros(len(y_N))
    x_N = np.arange(len(y_N)) - (len(y_N) - 1) / 2
    slope = float(x_N @ y_N / (x_N @ x_N))
    return slope, y_N - y_N.mean() - slope * x_N


def _global(signals: Signals, coming: Coming) -> list[float]:
    loss, grad, noise, nan = signals.loss, signals.log_grad, signals.noise, math.nan
    past = [
        (signals.last_loss - loss[8].value) / noise,
        (loss[8].value - loss[32].value) / noise,
        (loss[32].value - loss[128].value) / noise,
        *(signals.slope(scale) * scale / noise for scale in (8, 32, 128)),
        math.log(max(abs(loss[32].value), TINY)),
        math.log(max(noise / max(abs(loss[32].value), TINY), TINY)),
        signals.oscillation,
        signals.last_log_grad - grad[8].value,
        grad[8].value - grad[32].value,
        grad[32].value - grad[128].value,
        math.log(max(signals.grad_noise, TINY)) if signals.grad_noise else nan,
    ]
    return [
        *(past if signals.seen else [nan] * len(past)),
        coming.lr_factor,
        coming.lr_factor - signals.last_lr if signals.steps else nan,
        coming.position,
        math.log1p(signals.since_jump),
        float(coming.relaxing),
        math.log(max(coming.tokens, TINY)),
        math.log(max(coming.seq_len, TINY)),
    ]


def _kinds(stats: GroupStats | None, lr_factor: float) -> list[float]:
    if stats is None:
        return [math.nan] * (4 * len(KINDS))
    pp_G, gg_G, gd_G, dd_G, du_G, uu_G = stats.table_GC.T[[0, 4, 5, 7, 8, 9]]
    with np.errstate(all="ignore"):
        columns = (
            0.5 * np.log(dd_G / pp_G),
            gd_G / np.sqrt(dd_G * gg_G),
            du_G / np.sqrt(dd_G * uu_G),
            0.5 * np.log(uu_G / stats.elements_G) - np.log(lr_factor),
        )
    return np.stack(columns, -1).ravel().tolist()


def made_up(every: int, lacking: int = 0) -> list[tuple[StepFacts, GroupStats | None]]:
    """Steps, each with the look that was there before it; the model lacks the first kinds."""
    return list(_made_up(every, np.arange(len(KINDS)) >= lacking))


def _made_up(every: int, there_G: np.ndarray) -> Iterator[tuple[StepFacts, GroupStats | None]]:
    rng, look = np.random.default_rng(0), None
    for step in range(1, STEPS + 1):
        loss, grad_norm = 2 + 3 * math.exp(-step / 100) + 0.05 * rng.standard_normal(), rng.lognormal(0.0, 0.2)
        lr_factor = min(step / 50, 0.5 + 0.5 * math.cos(math.pi * step / STEPS) + 1e-3)
        yield StepFacts(step, float(loss), float(grad_norm), lr_factor, step / STEPS, 4096, 256), look
        if step % every == 0:
            table_GC = rng.lognormal(0.0, 0.5, (len(KINDS), 12)) * there_G[:, None]
            look = GroupStats(step, table_GC, 1000 * there_G)


PROVIDERS: dict[str, Callable[[], Pair]] = {
    "reference": lambda: (PlainSignals(2.5), PlainEncoder().features),
    "scale": lambda: (Signals(2.5), FeatureEncoder().features),
}


def features_agree(every: int) -> None:
    """Raises ScaleError at the first step where the two differ."""
    for lacking in (0, 4):
        (plain, reference), (signals, encode) = (make() for make in PROVIDERS.values())
        for facts, look in made_up(every, lacking):
            coming = Coming.of(facts)
            right, found = reference(plain, coming, look), encode(signals, coming, look)
            if wrong := [n for n, x, y in zip(NAMES, right, found, strict=True) if not abs(x - y) <= CLOSE]:
                raise ScaleError(f"features of step {facts.step} differ from the plain ones: {', '.join(wrong)}")
            plain.update(facts)
            signals.update(facts)


def cost(every: int, rounds: int) -> list[Row]:
    """Microseconds per call of `features` and of `Signals.update`, after one round that does not count."""
    run = [(facts, Coming.of(facts), look) for facts, look in made_up(every)]
    measured: dict[str, dict[str, list[float]]] = {metric: {} for metric in ("features", "signals")}
    for i in range(rounds + 1):
        for name, make in PROVIDERS.items():
            for metric, seconds in zip(measured, _timed(run, make), strict=True):
                if i:
                    measured[metric].setdefault(name, []).append(seconds / (STEPS - FIRST) * 1e6)
    config = f"features {len(NAMES)}; look every {every}; threads 1"
    return [
        row
        for metric, values in measured.items()
        for row in summarise("rssm_kernel", metric, "us/call", every, config, values, "reference")
    ]


def _timed(run: list[tuple[StepFacts, Coming, GroupStats | None]], make: Callable[[], Pair]) -> tuple[float, float]:
    """Seconds of this thread after the first steps: of encoding, what a run with it takes longer, and of updating."""
    seconds = []
    for encoding in (False, True):
        signals, encode = make()
        for i, (facts, coming, look) in enumerate(run):
            if i == FIRST:
                began = time.thread_time()
            if encoding:
                encode(signals, coming, look)
            signals.update(facts)
        seconds.append(time.thread_time() - began)
    return seconds[1] - seconds[0], seconds[0]
