"""Two controls that know nothing of the schedule: a power law in the steps, and the last value."""

from __future__ import annotations

import math

import numpy as np

from scale.forecast.curve import Curve

IRREDUCIBLE = (math.log(0.3), 0.4)
REDUCIBLE = (math.log(0.3), 0.9)
ALPHA = (math.log(0.35), 0.35)
"""Priors: mean and standard deviation of the logarithms of L0 and A in units of the last known loss, and of alpha. Wide, and
centred where development runs of benchmarks/forecast.py were forecast best."""


class PowerLaw:
    """L(t) = L0 + A (t / t_last)^-alpha, for the steps t. Parameters: log L0, log A, log alpha."""

    def __init__(self, curve: Curve):
        unit = math.log(curve.measured(curve.last))
        self.unit_step = curve.last
        self.mean_P = np.array([unit + IRREDUCIBLE[0], unit + REDUCIBLE[0], ALPHA[0]])
        self.scale_P = np.array([IRREDUCIBLE[1], REDUCIBLE[1], ALPHA[1]])

    def loss(self, theta_P: np.ndarray, step_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Law.loss`."""
        floor, height, alpha = np.exp(theta_P)
        log_M = np.log(step_M / self.unit_step)
        fall_M = height * np.exp(-alpha * log_M)
        slope_MP = np.stack([np.full(len(fall_M), floor), fall_M, -alpha * log_M * fall_M], axis=1)
        return floor + fall_M, slope_MP
