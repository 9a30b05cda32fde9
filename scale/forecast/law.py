"""Fitting a law of loss curves to a curve: maximum a posteriori, several seeded starts, and a bootstrap.

Letters: P parameters of the law, B bins of the curve, M steps at which the law is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.optimize import minimize

from scale.forecast.curve import Bins

MISFIT = 0.005
"""No law is true: a log residual smaller than this is as good as none, however little noise the bins have."""
HUBER = 1.5
"""Residuals beyond this many standard deviations count linearly."""
STARTS = 5
REACH = 5.0
"""Parameters stay within this many prior standard deviations of the prior mean."""


class Law(Protocol):
    """A family of curves with P unconstrained parameters, each with a normal prior."""

    mean_P: np.ndarray
    scale_P: np.ndarray

    def loss(self, theta_P: np.ndarray, step_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss at each step (M) and its derivatives (M, P)."""
        ...


@dataclass(frozen=True)
class Fit:
    """The most probable parameters. `error`: root mean square of the log residuals; `value`: what was minimised."""

    theta_P: np.ndarray
    residual_B: np.ndarray
    error: float
    value: float


def fit(law: Law, bins: Bins, rng: np.random.Generator) -> Fit:
    """Fit by L-BFGS from the prior mean and from draws of the prior; the best end wins.

    Minimises sum_B huber(log residual / spread_B) + 1/2 sum_P ((theta - mean) / scale)^2.
    """
    draws = rng.standard_normal((STARTS - 1, len(law.mean_P)))
    starts = [law.mean_P, *(law.mean_P + law.scale_P * draw for draw in draws)]
    ends = [_descend(law, bins, bins.log_B, law.mean_P, start, 150) for start in starts]
    theta_P, value = min(ends, key=lambda end: end[1])
    residual_B = bins.log_B - np.log(law.loss(theta_P, bins.step_B)[0])
    return Fit(theta_P, residual_B, float(np.sqrt(np.mean(residual_B**2))), value)


def bootstrap(law: Law, bins: Bins, best: Fit, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Parameters refitted `draws` times: (draws, P).

    Each time the residuals are resampled and the prior means redrawn from the prior, then fitted again. What the losses
    determine varies as their noise does; what they say nothing about varies as the prior does (randomise then optimise:
    Bardsley et al., SIAM J. Sci. Comput. 36, 2014).
    """
    fitted_B = bins.log_B - best.residual_B
    ends = []
    for _ in range(draws):
        noise_B = rng.choice(best.residual_B, len(fitted_B))
        mean_P = law.mean_P + law.scale_P * rng.standard_normal(len(law.mean_P))
        ends.append(_descend(law, bins, fitted_B + noise_B, mean_P, best.theta_P, 40)[0])
    return np.array(ends)


def _descend(
    law: Law, bins: Bins, log_B: np.ndarray, mean_P: np.ndarray, start_P: np.ndarray, most: int
) -> tuple[np.ndarray, float]:
    """Where L-BFGS ends, and the value there."""
    age_B = bins.step_B[-1] / bins.step_B
    spread_B = np.hypot(bins.noise_B, MISFIT) * np.sqrt(
        age_B
    )  # a law holds better over a shorter stretch: old losses count less

    def objective(theta_P: np.ndarray) -> tuple[float, np.ndarray]:
        loss_B, slope_BP = law.loss(theta_P, bins.step_B)
        error_B = (np.log(loss_B) - log_B) / spread_B
        far_B = np.abs(error_B) > HUBER
        cost = np.where(far_B, HUBER * (np.abs(error_B) - 0.5 * HUBER), 0.5 * error_B**2).sum()
        pull_B = np.clip(error_B, -HUBER, HUBER) / (spread_B * loss_B)
        prior_P = (theta_P - mean_P) / law.scale_P
        return float(cost + 0.5 * prior_P @ prior_P), pull_B @ slope_BP + prior_P / law.scale_P

    reach_P = REACH * law.scale_P
    bounds = list(zip(law.mean_P - reach_P, law.mean_P + reach_P, strict=True))
    start_P = np.clip(start_P, law.mean_P - reach_P, law.mean_P + reach_P)
    end = minimize(objective, start_P, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": most})
    return end.x, float(end.fun)
