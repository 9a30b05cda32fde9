"""The 64 numbers that the world model sees before a step. None of them knows what the step will bring."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from scale.predict.groups import KINDS
from scale.predict.moments import GroupStats, StepFacts
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
    "relaxing": "1 for a step right after a jump",
    "log_tokens": "log of the tokens in the batch",
    "log_seq_len": "log of the row length",
}
PER_KIND = {
    "drift": "log of the norm of the drift of {kind} relative to the norm of the weights",
    "drift_gradient": "cosine between drift and gradient of {kind}",
    "update_drift": "cosine between the update of {kind} and its drift, the smoothed earlier updates",
    "update": "log of the RMS update of {kind} per unit of lr: for AdamW the RMS of m / sqrt(v)",
}
FIXED = {
    "lr_factor": (0.5, 0.5),
    "position": (0.5, 0.5),
    "since_jump": (3.0, 2.0),
    "relaxing": (0.0, 1.0),
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


@dataclass(frozen=True)
class Coming:
    """What is known of a step before it is made: `StepFacts` without its outcome."""

    step: int
    lr_factor: float
    position: float
    tokens: int
    seq_len: int
    relaxing: bool = False

    @classmethod
    def of(cls, facts: StepFacts) -> Coming:
        """The known part of a step that was made already."""
        return cls(facts.step, facts.lr_factor, facts.position, facts.tokens, facts.seq_len, facts.relaxing)


class FeatureEncoder:
    """Raw numbers to normalised features: running mean and variance (Welford 1962), cut off at 5 deviations."""

    def __init__(self) -> None:
        self.count_F = np.zeros(len(NAMES))
        self.mean_F = np.zeros(len(NAMES))
        self.spread_F = np.zeros(len(NAMES))
        """Sum of squared deviations."""
        scales = [FIXED.get(name, (math.nan, math.nan)) for name in NAMES]
        self._centre_F, self._scale_F = np.array(scales).T
        self._online_F = np.isnan(self._centre_F)

    def features(self, signals: Signals, coming: Coming, stats: GroupStats | None) -> list[float]:
        """64 numbers within +-5, before the step is made; `stats` of an earlier step, None if nobody looked yet.

        Call it once for each step: it teaches the normalisation. What is unknown or not finite is 0. Raises
        ValueError if `stats` are from the coming step or later, because they hold its gradient.
        """
        if stats is not None and stats.step >= coming.step:
            raise ValueError(f"features of step {coming.step} from statistics of step {stats.step}: it is not made yet")
        raw_F = np.array(_global(signals, coming) + _kinds(stats, signals.last_lr))
        known_F = np.isfinite(raw_F)
        raw_F = np.clip(np.where(known_F, raw_F, 0.0), -WIDEST, WIDEST)
        self._learn(raw_F, known_F)
        enough_F = self.count_F > 1
        deviation_F = np.sqrt(self.spread_F / np.maximum(self.count_F - 1, 1))
        centre_F = np.where(self._online_F, self.mean_F, self._centre_F)
        scale_F = np.where(self._online_F, np.maximum(deviation_F, 1e-6), self._scale_F)
        usable_F = known_F & (enough_F | ~self._online_F)
        scaled_F = np.where(usable_F, (raw_F - centre_F) / scale_F, 0.0)
        return [float(x) for x in np.clip(scaled_F, -CLIP, CLIP)]

    def _learn(self, raw_F: np.ndarray, known_F: np.ndarray) -> None:
        self.count_F += known_F
        before_F = raw_F - self.mean_F
        self.mean_F += np.where(known_F, before_F / np.maximum(self.count_F, 1), 0.0)
        self.spread_F += np.where(known_F, before_F * (raw_F - self.mean_F), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {name: pack_array(getattr(self, name)) for name in ("count_F", "mean_F", "spread_F")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.count_F, self.mean_F, self.spread_F = (
            unpack_array(state[name]) for name in ("count_F", "mean_F", "spread_F")
        )


def _global(signals: Signals, coming: Coming) -> list[float]:
    loss, grad, noise = signals.loss, signals.log_grad, signals.noise
    if not signals.seen:
        past = [math.nan] * 13
    else:
        past = [
            (signals.last_loss - loss[8].value) / noise,
            (loss[8].value - loss[32].value) / noise,
            (loss[32].value - loss[128].value) / noise,
            *(signals.slope(scale) * scale / noise for scale in (8, 32, 128)),
            _log(abs(loss[32].value)),
            _log(noise / max(abs(loss[32].value), TINY)),
            signals.oscillation,
            signals.last_log_grad - grad[8].value,
            grad[8].value - grad[32].value,
            grad[32].value - grad[128].value,
            _log(signals.grad_noise) if signals.grad_noise else math.nan,
        ]
    return [
        *past,
        coming.lr_factor,
        coming.lr_factor - signals.last_lr if signals.steps else math.nan,
        coming.position,
        math.log1p(signals.since_jump),
        float(coming.relaxing),
        _log(coming.tokens),
        _log(coming.seq_len),
    ]


def _kinds(stats: GroupStats | None, lr_factor: float) -> list[float]:
    """Four numbers of each kind, nan where there are none. `lr_factor`: of the update that was looked at."""
    if stats is None:
        return [math.nan] * len(KINDS) * len(PER_KIND)
    pp_G, gg_G, gd_G, dd_G, du_G, uu_G = np.asarray(stats.table_GC, np.float64).T[[0, 4, 5, 7, 8, 9]]
    elements_G = np.asarray(stats.elements_G, np.float64)
    with np.errstate(all="ignore"):
        columns = (
            0.5 * np.log(dd_G / pp_G),
            gd_G / np.sqrt(dd_G * gg_G),
            du_G / np.sqrt(dd_G * uu_G),
            0.5 * np.log(uu_G / elements_G) - np.log(lr_factor),
        )
    table_GN = np.stack(columns, -1)
    table_GN[elements_G == 0] = math.nan
    return [float(x) for x in table_GN.ravel()]


def _log(x: float) -> float:
    return math.log(max(x, TINY))
