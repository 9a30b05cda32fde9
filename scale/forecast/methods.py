"""Every way to forecast, behind one face: fit a curve, then say the loss at any step and how far it may be off.

Letters: M steps that are asked about, D draws of the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from scale.forecast.curve import Curve
from scale.forecast.law import Law, bootstrap, fit
from scale.forecast.multi_power_law import SEEN, MultiPowerLaw
from scale.forecast.power_law import PowerLaw
from scale.forecast.world import WorldModelForecast


@dataclass(frozen=True)
class Fitted:
    """A method fitted to a curve. `error`: root mean square of the relative residuals; `note`: what to know of the fit."""

    error: float
    at: Callable[[np.ndarray], np.ndarray]
    """Loss at each step (M)."""
    draws: Callable[[np.ndarray, int], np.ndarray]
    """Loss at each step under so many refits: (D, M)."""
    note: str = ""


Method = Callable[[Curve, int], Fitted]
"""Fits a curve; the number is a seed. Raises UsageError if there is too little of it."""


def last_value(curve: Curve, seed: int) -> Fitted:
    """The average of the last window, for ever."""
    bins, value = curve.bins, curve.measured(curve.last)
    rng = np.random.default_rng(seed)

    def draws(step_M: np.ndarray, count: int) -> np.ndarray:
        spread = bins.noise / math.sqrt(curve.window)
        return value * np.exp(spread * rng.standard_normal((count, 1))) * np.ones(len(step_M))

    recent_B = bins.log_B[-max(1, len(bins.log_B) // 8) :]
    error = float(np.sqrt(np.mean((recent_B - math.log(value)) ** 2)))
    return Fitted(error, lambda step_M: np.full(len(step_M), value), draws)


def power_law(curve: Curve, seed: int) -> Fitted:
    """`PowerLaw` fitted to the curve."""
    return _fitted(PowerLaw(curve), curve, seed, "ignores the schedule")


def multi_power_law(curve: Curve, seed: int) -> Fitted:
    """`MultiPowerLaw` fitted to the curve."""
    law = MultiPowerLaw(curve)
    falls = bool((np.diff(curve.lr_T[curve.last - 1 :]) < 0).any())
    note = ""
    if law.fall_seen < SEEN and falls:
        note = "the learning rate has not fallen yet: what its fall will bring (B, C, beta, gamma) is a prior's"
    return _fitted(law, curve, seed, note)


def world_model(curve: Curve, seed: int) -> Fitted:
    """`WorldModelForecast` taught on the curve."""
    world = WorldModelForecast(curve, seed)

    def draws(step_M: np.ndarray, count: int) -> np.ndarray:
        shift_D1 = np.random.default_rng(seed + 1).standard_normal((count, 1))
        return np.exp(world.log_loss(step_M) + world.spread(step_M) * shift_D1)

    seen = curve.lr_T[curve.first : curve.last]
    ahead = curve.lr_T[curve.last :]
    strange = ahead.min() < seen.min() - SEEN or ahead.max() > seen.max() + SEEN
    note = "its fit error is that of the next coarse step" + (
        "; learning rates lie ahead that this run has not had yet" if strange else ""
    )
    return Fitted(world.error, lambda step_M: np.exp(world.log_loss(step_M)), draws, note)


def _fitted(law: Law, curve: Curve, seed: int, note: str) -> Fitted:
    best = fit(law, curve.bins, np.random.default_rng(seed))

    def draws(step_M: np.ndarray, count: int) -> np.ndarray:
        thetas_DP = bootstrap(law, curve.bins, best, count, np.random.default_rng(seed + 1))
        return np.array([law.loss(theta_P, step_M)[0] for theta_P in thetas_DP])

    return Fitted(best.error, lambda step_M: law.loss(best.theta_P, step_M)[0], draws, note)


CONSTANT = "last value"
"""The method that foresees nothing: no other's interval is wider because of it."""
METHODS: Mapping[str, Method] = {
    "multi-power law": multi_power_law,
    "world model": world_model,
    "power law": power_law,
    CONSTANT: last_value,
}
"""By name, the preferred first."""
