"""The Multi-Power Law: a loss curve from its learning-rate schedule.

Luo et al., "A Multi-Power Law for Loss Curve Prediction Across Learning Rate Schedules", arXiv 2503.12811:

    L(t)  = L0 + A (S_1(t) + S_W)^-alpha - LD(t)
    LD(t) = B sum_{k=1..t} (eta_{k-1} - eta_k) G(eta_k^-gamma S_k(t)),    G(x) = 1 - (C x + 1)^-beta

S_k(t) is the sum of the learning rates of steps k..t, S_W that of the warm-up, and step 1 the first one after it.

Here eta is a factor of the peak p, so that priors hold for any peak: B is the paper's B p, C its C p^(1 - gamma), and A
belongs to the learning-rate sum at the last known step. The priors of C, beta and gamma centre on the authors' fits to models
of 25M to 400M parameters at a peak of 3e-4 (C p^(1 - gamma) 0.11 to 0.12, beta 0.58 to 0.60, gamma 0.64 to 0.66), whose B p
was 0.11 to 0.16; that of B, like those of L0, A and alpha, was chosen on the development runs of benchmarks/forecast.py,
which fell by more, and reaches down to theirs. Until the learning rate has fallen, B, C, beta and gamma are the prior's.
"""

from __future__ import annotations

import math

import numpy as np

from scale.forecast.curve import Curve
from scale.forecast.power_law import ALPHA, IRREDUCIBLE, REDUCIBLE

SEGMENTS = 96
"""Stretches of the schedule within which the fall of the learning rate counts as one."""
LOWEST = 0.01
"""Factor of the peak below which eta_k^-gamma rises no further; a schedule may end at 0."""
SEEN = 0.02
"""A fall of the learning rate by less than this factor of the peak tells nothing about B, C, beta, gamma."""

DROP = (math.log(0.35), 0.6)
PACE = (math.log(0.11), 0.8)
BETA = (math.log(0.59), 0.2)
GAMMA = (0.64, 0.15)
"""Priors: mean and standard deviation of log B (nats), log C (per step at the peak), log beta, and gamma."""


class MultiPowerLaw:
    """The law over one schedule. Parameters: log L0, log A, log alpha, log B, log C, log beta, gamma."""

    def __init__(self, curve: Curve, segments: int = SEGMENTS):
        unit = math.log(curve.measured(curve.last))
        priors = [IRREDUCIBLE, REDUCIBLE, ALPHA, DROP, PACE, BETA, GAMMA]
        self.mean_P, self.scale_P = (np.array(column) for column in zip(*priors, strict=True))
        self.mean_P[:2] += unit
        self.least = 0.05 * math.exp(unit)
        self._steps = np.arange(curve.steps + 1)
        self._lr = np.concatenate([[0.0], curve.lr_T])
        self._sum = np.cumsum(self._lr)
        self._edges = np.unique(np.linspace(curve.warmup, curve.steps, segments + 1).round().astype(int))
        self.unit_sum = self._sum[curve.last]
        self.fall_seen = float(self._lr[curve.warmup :].max() - self._lr[curve.last])
        self._kept: tuple[bytes, tuple[np.ndarray, ...]] = (b"", ())

    def loss(self, theta_P: np.ndarray, step_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Law.loss`."""
        floor, height, alpha, drop, pace, beta = np.exp(theta_P[:6])
        log_M, delta_MK, reach_MK, log_lr_MK = self._geometry(step_M)
        fall_M = height * np.exp(-alpha * log_M)
        x_MK = pace * reach_MK * np.exp(-theta_P[6] * log_lr_MK)
        rest_MK = (x_MK + 1) ** -beta
        inner_MK = delta_MK * beta * x_MK * rest_MK / (x_MK + 1)  # derivative by log x
        gained_M = drop * (delta_MK * (1 - rest_MK)).sum(axis=1)
        by_beta_M = drop * beta * (delta_MK * rest_MK * np.log1p(x_MK)).sum(axis=1)
        by_pace_M = drop * inner_MK.sum(axis=1)
        by_gamma_M = -drop * (inner_MK * log_lr_MK).sum(axis=1)
        loss_M = floor + fall_M - gained_M
        slopes = [np.full(len(fall_M), floor), fall_M, -alpha * log_M * fall_M, -gained_M, -by_pace_M, -by_beta_M]
        slope_MP = np.stack([*slopes, -by_gamma_M], axis=1)
        low_M = loss_M < self.least
        return np.where(low_M, self.least, loss_M), np.where(low_M[:, None], 0.0, slope_MP)

    def _geometry(self, step_M: np.ndarray) -> tuple[np.ndarray, ...]:
        """What of the law depends on the schedule alone, kept for the steps asked last.

        log of the learning-rate sum in units of its last known value (M); and for each segment up to the step: the fall of
        the learning rate, the sum of learning rates since, the log of the learning rate there (each M, K).
        """
        key = step_M.tobytes()
        if self._kept[0] != key:
            start_K, end_K = self._edges[:-1], self._edges[1:]
            end_MK = np.clip(step_M[:, None], start_K, end_K)
            delta_MK = self._at(self._lr, start_K) - self._at(self._lr, end_MK)
            sum_M = self._at(self._sum, step_M)
            since_MK = sum_M[:, None] - self._at(self._sum, (start_K + end_MK - 1) / 2)
            lr_MK = self._at(self._lr, (start_K + end_MK + 1) / 2)
            log_M = np.log(sum_M / self.unit_sum)
            self._kept = key, (log_M, delta_MK, np.maximum(since_MK, 0), np.log(np.maximum(lr_MK, LOWEST)))
        return self._kept[1]

    def _at(self, values: np.ndarray, step: np.ndarray) -> np.ndarray:
        return np.interp(step, self._steps, values)
