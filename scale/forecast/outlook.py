"""The forecast of a run: every method's, with its interval, and which of them to believe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scale.errors import UsageError
from scale.forecast.curve import Curve
from scale.forecast.interval import WIDENING, past_errors, rms, spreads, window_noise
from scale.forecast.methods import CONSTANT, METHODS, Fitted, Method

MARGIN = 0.5
"""The first method is left only for one whose past errors are smaller than this share of its own: a law without schedule
fits a past without decay as well, and would miss the decay ahead."""
POINTS = 60
"""Steps ahead at which the path of a forecast is told."""


@dataclass(frozen=True)
class Forecast:
    """What a method says of the loss at the end, and on the way there (M steps).

    Losses are nats per token. `error`: relative root mean square error of the fit; `past`: that of forecasts it would have
    made earlier in this run, nan where there is too little past.
    """

    method: str
    loss: float
    lower: float
    upper: float
    spread: float
    error: float
    past: float
    note: str
    step_M: np.ndarray
    loss_M: np.ndarray
    lower_M: np.ndarray
    upper_M: np.ndarray


@dataclass(frozen=True)
class Outlook:
    """All forecasts of a run from a part of it, by method; `chosen` is the one to believe, for the reason given.

    `left_out`: methods that need more of the run, with what they say.
    """

    curve: Curve
    forecasts: Mapping[str, Forecast]
    left_out: Mapping[str, str]
    chosen: str
    reason: str

    @property
    def best(self) -> Forecast:
        return self.forecasts[self.chosen]


def look_ahead(curve: Curve, seed: int = 0, methods: Mapping[str, Method] = METHODS) -> Outlook:
    """Forecast the average loss of the last window of the run. Seeded; the same curve gives the same numbers.

    Raises UsageError if there are too few losses or nothing lies ahead.
    """
    curve.bins  # noqa: B018  # says what is missing
    if curve.last >= curve.steps:
        raise UsageError(
            f"all {curve.steps} steps are known: nothing lies ahead (--at 0.5 forecasts from the first half)"
        )
    fits: dict[str, tuple[Fitted, list[float]]] = {}
    left_out: dict[str, str] = {}
    for name, method in methods.items():
        try:
            fits[name] = method(curve, seed), past_errors(method, curve, seed)
        except UsageError as error:
            left_out[name] = str(error)
    near = curve.near(curve.steps)
    ends = {name: math.log(fitted.at(near).mean()) for name, (fitted, _) in fits.items()}
    forecasts = {}
    for name, (fitted, errors) in fits.items():
        others = [ends[name] - end for other, end in ends.items() if other not in (name, CONSTANT)]
        forecasts[name] = _forecast(name, fitted, curve, errors, others)
    chosen, reason = choose(forecasts, window_noise(curve))
    return Outlook(curve, forecasts, left_out, chosen, reason)


def choose(forecasts: Mapping[str, Forecast], noise: float) -> tuple[str, str]:
    """The method to believe by the errors it would have made in this run's past, and why.

    `noise` of the measured losses is added to all of these errors: a smaller one was luck.
    """
    first = next(iter(forecasts.values()))
    if math.isnan(first.past):
        return first.method, "too little past to compare methods on"
    rival = min(forecasts.values(), key=lambda forecast: forecast.past)
    if math.hypot(rival.past, noise) < MARGIN * math.hypot(first.past, noise):
        return (
            rival.method,
            f"forecasts of this run's past: off by {rival.past:.1%}, {first.method} by {first.past:.1%}",
        )
    others = ", ".join(f"{f.method} {f.past:.1%}" for f in forecasts.values() if f is not first)
    return (
        first.method,
        f"forecasts of this run's past: off by {first.past:.1%} ({others}); it alone knows the schedule",
    )


def _forecast(name: str, fitted: Fitted, curve: Curve, errors: Sequence[float], others: Sequence[float]) -> Forecast:
    near = curve.near(curve.steps)
    step_M = np.unique(np.linspace(curve.last, near.mean(), POINTS).round()).astype(np.int64)
    spread_M = spreads(fitted, curve, errors, others, step_M)
    loss_M = fitted.at(step_M)
    loss_M[-1], step_M[-1] = fitted.at(near).mean(), curve.steps  # the end is a window, asked about at its middle
    lower_M, upper_M = (loss_M * np.exp(sign * WIDENING[name] * spread_M) for sign in (-1, 1))
    return Forecast(
        method=name,
        loss=float(loss_M[-1]),
        lower=float(lower_M[-1]),
        upper=float(upper_M[-1]),
        spread=float(spread_M[-1]),
        error=fitted.error,
        past=rms(errors) if errors else math.nan,
        note=fitted.note,
        step_M=step_M,
        loss_M=loss_M,
        lower_M=lower_M,
        upper_M=upper_M,
    )
