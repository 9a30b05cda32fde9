"""The 64 numbers that the world model sees before a step. None of them knows what the step will bring."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from scale.predict.kinds import KINDS
from scale.predict.moments import ComingStep, Statistics
from scale.predict.packing import pack_array, unpack_array
from scale.predict.signals import TINY, Signals

GLOBAL = {
    "loss_8": "last loss above its average over 8 steps, in units of noise",
    "loss_32": "average loss over 8 steps above that over 32, in units of noise",
    "loss_128": "average loss over 32 steps above that over 128, in units of noise",
    "slope_8": "least-squares change of the loss over the last 8 steps, in units of noise",
    "slope_32": "the same over 32 steps",
    "slope_128": "the same over 128 steps",
    "log_loss": "log of the average loss over 32 steps",
    "log_noise": "log of the noise of single losses, relative to the average loss",
    "oscillation": "share of sign changes of the last 32 losses around their line",
    "grad_8": "log of the last gradient norm above its average over 8 steps",
    "grad_32": "average log gradient norm over 8 steps above that over 32",
    "grad_128": "average log gradient norm over 32 steps above that over 128",
    "grad_noise": "log of the standard deviation of log gradient norms",
    "lr_factor": "learning rate of the step, as a share of the peak",
    "lr_change": "change of that share since the last step",
    "position": "share of the run that is done",
    "since_jump": "log of the steps since the last jump, or since the start",
    "settling": "1 for a step between a jump and its acceptance test",
    "log_tokens": "log of the tokens in the batch",
    "log_seq_len": "log of the row length",
}
PER_KIND = {
    "drift": "log of the norm of the smoothed update of {kind} relative to the norm of the weights",
    "drift_gradient": "cosine between smoothed update and gradient of {kind}",
    "update_drift": "cosine between the update of {kind} and its smoothed earlier updates",
    "update": "log of the RMS update of {kind} per unit of lr: for AdamW the RMS of m / sqrt(v)",
}
FIXED = {
    "lr_factor": (0.5, 0.5),
    "position": (0.5, 0.5),
    "since_jump": (3.0, 2.0),
    "settling": (0.0, 1.0),
    "oscillation": (0.5, 0.2),
}
"""Features of a known range: centre and scale. All others are normalised by what was seen of them."""
NAMES = {
    **GLOBAL,
    **{f"{name}_{kind}": line.format(kind=kind) for kind in KINDS for name, line in PER_KIND.items()},
}
"""Name and meaning of each of the 64 features, in order. Those of kinds that the model lacks are 0."""
CLIP = 5.0
WIDEST = 1e3
"""Raw features beyond this are cut off before they enter the normalisation: one would spoil it for the whole run."""


class FeatureEncoder:
    """Raw numbers to normalised features: running mean and variance (Welford 1962), cut off at 5 deviations.

    Unknown numbers are given their mean, which teaches nothing and becomes 0.
    """

    def __init__(self) -> None:
        self.count_F, self.mean_F, self.spread_F = np.zeros((3, len(NAMES)))
        """Numbers seen, their mean, and the sum of their squared deviations."""

    def features(self, signals: Signals, coming: ComingStep, statistics: Statistics | None) -> list[float]:
        """64 numbers within +-5, before the step is made; `statistics` of an earlier step, None if there are none yet.

        Call it once for each step: it teaches the normalisation. What is unknown or not finite is 0. Raises
        ValueError if `statistics` are from the coming step or later, because they hold its gradient.
        """
        if statistics is not None and statistics.step >= coming.step:
            raise ValueError(
                f"features of step {coming.step} from statistics of step {statistics.step}: it is not made yet"
            )
        raw_F = np.array(_global(signals, coming) + _by_kind(statistics, signals.last_lr))
        scaled_F = self._normalised(raw_F)
        for i, (centre, scale) in _FIXED.items():
            x = (raw_F[i] - centre) / scale
            scaled_F[i] = min(max(x, -CLIP), CLIP) if math.isfinite(x) else 0.0
        out: list[float] = scaled_F.tolist()
        return out

    def _normalised(self, raw_F: np.ndarray) -> np.ndarray:
        known_F = np.isfinite(raw_F)
        raw_F = np.clip(np.where(known_F, raw_F, self.mean_F), -WIDEST, WIDEST)
        self.count_F += known_F
        before_F = raw_F - self.mean_F
        self.mean_F += before_F / np.maximum(self.count_F, 1)
        after_F = raw_F - self.mean_F
        self.spread_F += before_F * after_F
        deviation_F = np.sqrt(self.spread_F / np.maximum(self.count_F - 1, 1))
        return np.clip(after_F / np.maximum(deviation_F, 1e-6), -CLIP, CLIP)

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {name: pack_array(getattr(self, name)) for name in ("count_F", "mean_F", "spread_F")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises ValueError if it has another number of features."""
        for name in ("count_F", "mean_F", "spread_F"):
            getattr(self, name)[:] = unpack_array(state[name])


_FIXED = {i: FIXED[name] for i, name in enumerate(GLOBAL) if name in FIXED}


def _global(signals: Signals, coming: ComingStep) -> list[float]:
    return [
        *(_past(signals) if signals.seen else [math.nan] * 13),
        coming.lr_factor,
        coming.lr_factor - signals.last_lr if signals.steps else math.nan,
        coming.position,
        math.log1p(signals.since_jump),
        float(coming.settling),
        _log(coming.tokens),
        _log(coming.seq_len),
    ]


def _past(signals: Signals) -> list[float]:
    loss_8, loss_32, loss_128 = (signals.loss[8].value, signals.loss[32].value, signals.loss[128].value)
    grad_8, grad_32, grad_128 = (signals.log_grad[8].value, signals.log_grad[32].value, signals.log_grad[128].value)
    noise, grad_noise, trend = signals.noise, signals.grad_noise, signals.recent.trend()
    slope_8, slope_32, slope_128 = trend.slope_S
    size = abs(loss_32)
    return [
        (signals.last_loss - loss_8) / noise,
        (loss_8 - loss_32) / noise,
        (loss_32 - loss_128) / noise,
        slope_8 * 8 / noise,
        slope_32 * 32 / noise,
        slope_128 * 128 / noise,
        _log(size),
        _log(noise / max(size, TINY)),
        trend.sign_changes,
        signals.last_log_grad - grad_8,
        grad_8 - grad_32,
        grad_32 - grad_128,
        _log(grad_noise) if grad_noise else math.nan,
    ]


def _by_kind(statistics: Statistics | None, lr_factor: float) -> list[float]:
    """Four numbers of each kind; nan where there are none: all sums over a kind without elements are 0."""
    if statistics is None:
        return [math.nan] * (len(KINDS) * len(PER_KIND))
    pp_G, gg_G, gd_G, dd_G, du_G, uu_G = statistics.table_GC.T[[0, 4, 5, 7, 8, 9]]
    with np.errstate(all="ignore"):
        numbers_NG = [
            0.5 * np.log(dd_G / pp_G),
            gd_G / np.sqrt(dd_G * gg_G),
            du_G / np.sqrt(dd_G * uu_G),
            0.5 * np.log(uu_G / statistics.elements_G) - np.log(lr_factor),
        ]
    out: list[float] = np.stack(numbers_NG, 1).ravel().tolist()
    return out


def _log(x: float) -> float:
    return math.log(TINY if x < TINY else x)
