"""How far a forecast may be off: a 90% interval from refits, from the run's own past and from other runs.

The spread of a forecast is the root of the sum of four squares, all of the logarithm of the loss:

- refits: the bootstrap of the fit, in which what the losses do not determine varies as its prior does;
- the past: errors of forecasts that the same method would have made earlier in this run, over the same relative distance;
- other methods: how far from it their forecasts of the end are;
- noise: of the window of losses that is forecast.

Half of the interval is the spread times `WIDENING` of the method: the split-conformal quantile of |error| / spread over
the development runs of benchmarks/forecast.py (Lei et al., arXiv 1604.04173, with locally weighted residuals).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from scale.errors import UsageError
from scale.forecast.curve import Curve
from scale.forecast.methods import Fitted, Method

COVERAGE = 0.9
CUTS = (0.45, 0.55, 0.65, 0.75)
"""Shares of the known steps after which the past is forecast."""
FARTHEST = 3.0
"""An error over a shorter distance is scaled up, at most so much."""
DRAWS = 32
WIDENING: Mapping[str, float] = {"multi-power law": 2.0, "world model": 2.0, "power law": 2.1, "last value": 1.25}
"""By method; chosen on development runs by `python benchmarks/forecast.py --calibrate`."""


def past_errors(method: Method, curve: Curve, seed: int) -> list[float]:
    """Log of forecast over measured loss, for forecasts made after each of `CUTS` over the distance that lies ahead now.

    The distance is relative: known / cut = end / known. Where that leads beyond what is known, the error at the last known
    step is scaled by the root of the ratio of the log distances. Empty if the curve is too short for any cut.
    """
    ahead = math.log(curve.steps / curve.last)
    errors = []
    for share in CUTS:
        cut = round(share * curve.last)
        target = min(curve.last, round(cut * curve.steps / curve.last))
        try:
            said = float(method(curve.until(cut), seed).at(curve.near(target)).mean())
        except UsageError:  # too little is known at this cut for this method: it has no error to report there
            continue
        measured = curve.measured(target)
        if target > cut and math.isfinite(measured):
            scale = min(FARTHEST, math.sqrt(ahead / math.log(target / cut)))
            errors.append(scale * math.log(said / measured))
    return errors


def spreads(
    fitted: Fitted, curve: Curve, errors: Sequence[float], others: Sequence[float], step_M: np.ndarray
) -> np.ndarray:
    """Standard deviation of the log of the loss at each step ahead (M), before widening.

    `errors`: of the past; `others`: logs of this forecast of the end over those of other methods. Both grow with the log of
    the distance.
    """
    refits_M = np.log(fitted.draws(step_M, DRAWS)).std(axis=0)
    share_M = np.log(np.maximum(step_M / curve.last, 1)) / math.log(curve.steps / curve.last)
    ahead_M = share_M * (rms(errors) ** 2 + rms(others) ** 2)
    return np.sqrt(refits_M**2 + ahead_M + window_noise(curve) ** 2)


def window_noise(curve: Curve) -> float:
    """Standard deviation of the log of an average over a window."""
    return curve.bins.noise / math.sqrt(curve.window)


def rms(errors: Sequence[float]) -> float:
    """Root mean square; 0 of nothing."""
    return math.sqrt(sum(error**2 for error in errors) / len(errors)) if errors else 0.0


def conformal_quantile(scores: Sequence[float], coverage: float = COVERAGE) -> float:
    """The ceil((n + 1) coverage)-th smallest of n scores: at least `coverage` of exchangeable new scores lie below it."""
    ordered = sorted(scores)
    rank = math.ceil((len(ordered) + 1) * coverage)
    return ordered[min(rank, len(ordered)) - 1]
