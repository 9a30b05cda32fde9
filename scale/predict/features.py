"""The 64 numbers that the world model sees before a step. None of them knows what the step will bring."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from scale.predict.groups import KINDS
from scale.predict.looks import PER_KIND, LookNumbers
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
    """Raw numbers to normalised features: running mean and variance (Welford 1962), cut off at 5 deviations.

    What depends on a look alone is computed when a new one arrives; between looks a call is a dozen operations on
    arrays made once. Unknown numbers are given their mean, which teaches nothing and becomes 0.
    """

    def __init__(self) -> None:
        F = len(NAMES)
        self.mean_F, self.spread_F = np.zeros(F), np.zeros(F)
        """`spread`: sum of squared deviations."""
        self._counts_3F = np.zeros((3, F))
        self.count_F, self._own_F, self._fewer_F = self._counts_3F
        """Numbers seen; the same, at least 1; one less, at least 1."""
        self._raw_F, self._before_F, self._after_F, self._scratch_F = np.zeros((4, F))
        self._known_3F = np.zeros((3, F))  # three times the same: adding it needs no broadcasting
        self._kinds = LookNumbers(self._raw_F[len(GLOBAL) :])
        self._steady, self._pattern = False, b""
        """All global numbers are known, and what is known was seen more than once; which are known, as bytes."""

    def features(self, signals: Signals, coming: Coming, stats: GroupStats | None) -> list[float]:
        """64 numbers within +-5, before the step is made; `stats` of an earlier step, None if nobody looked yet.

        Call it once for each step: it teaches the normalisation. What is unknown or not finite is 0. Raises
        ValueError if `stats` are from the coming step or later, because they hold its gradient.
        """
        if stats is not None and stats.step >= coming.step:
            raise ValueError(f"features of step {coming.step} from statistics of step {stats.step}: it is not made yet")
        values = _global(signals, coming)
        usual = math.hypot(*values) <= WIDEST  # all of them finite and none too wide
        if usual and self._steady and self._kinds.still(stats, signals.last_lr):
            _PACK(self._raw_F.data, 0, *values)
            np.add(self._counts_3F, self._known_3F, self._counts_3F)
        else:
            self._settle(values, stats, signals.last_lr)
        scaled = self._learn().tolist()
        for i, centre, scale in _FIXED:
            x = (values[i] - centre) / scale
            scaled[i] = x if -CLIP <= x <= CLIP else _clipped(x)
        return scaled

    def _settle(self, values: list[float], stats: GroupStats | None, lr_factor: float) -> None:
        """All raw numbers anew, what is known of them, and the counts with this step in them."""
        raw_F = self._raw_F
        _PACK(raw_F.data, 0, *values)
        self._kinds.look(stats, lr_factor)
        known_F = np.isfinite(raw_F)
        pattern = known_F.tobytes()
        if b"\0" in pattern:
            np.copyto(raw_F, self.mean_F, where=~known_F)
        np.minimum(raw_F, _WIDEST_F, out=raw_F)
        np.maximum(raw_F, _MINUS_WIDEST_F, out=raw_F)
        if not self._steady or pattern != self._pattern:
            self._pattern, self._known_3F[:] = pattern, known_F
            self._steady = False
        if b"\0" in pattern or not self._steady:
            self._kinds.known(known_F[len(GLOBAL) :])
        if self._steady:
            np.add(self._counts_3F, self._known_3F, self._counts_3F)
            return
        self.count_F += known_F
        np.maximum(self.count_F, 1, out=self._own_F)
        np.maximum(self.count_F - 1, 1, out=self._fewer_F)
        self._steady = bool(known_F[: len(GLOBAL)].all() and (self.count_F[known_F] > 1).all())

    def _learn(self) -> np.ndarray:
        """Mean and spread with the raw numbers in them, and the numbers in deviations from that mean."""
        raw_F, before_F, after_F, scratch_F = self._raw_F, self._before_F, self._after_F, self._scratch_F
        np.subtract(raw_F, self.mean_F, before_F)
        np.divide(before_F, self._own_F, scratch_F)
        np.add(self.mean_F, scratch_F, self.mean_F)
        np.subtract(raw_F, self.mean_F, after_F)
        np.multiply(before_F, after_F, before_F)
        np.add(self.spread_F, before_F, self.spread_F)
        np.divide(self.spread_F, self._fewer_F, scratch_F)
        np.sqrt(scratch_F, scratch_F)
        np.maximum(scratch_F, _LEAST_F, out=scratch_F)
        np.divide(after_F, scratch_F, scratch_F)
        np.minimum(scratch_F, _CLIP_F, out=scratch_F)
        return np.maximum(scratch_F, _MINUS_CLIP_F, out=scratch_F)

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {name: pack_array(getattr(self, name)) for name in ("count_F", "mean_F", "spread_F")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises ValueError if it has another number of features."""
        for name in ("count_F", "mean_F", "spread_F"):
            getattr(self, name)[:] = unpack_array(state[name])
        self._steady = False


_FIXED = [(i, *FIXED[name]) for i, name in enumerate(GLOBAL) if name in FIXED]
_PACK = struct.Struct(f"{len(GLOBAL)}d").pack_into
_WIDEST_F, _CLIP_F, _LEAST_F = (np.full(len(NAMES), x) for x in (WIDEST, CLIP, 1e-6))
_MINUS_WIDEST_F, _MINUS_CLIP_F = -_WIDEST_F, -_CLIP_F


def _clipped(x: float) -> float:
    return math.copysign(CLIP, x) if math.isfinite(x) else 0.0


def _global(signals: Signals, coming: Coming) -> list[float]:
    return [
        *(_past(signals) if signals.seen else _NO_PAST),
        coming.lr_factor,
        coming.lr_factor - signals.last_lr if signals.steps else math.nan,
        coming.position,
        math.log1p(signals.since_jump),
        float(coming.relaxing),
        _log(coming.tokens),
        _log(coming.seq_len),
    ]


_NO_PAST = [math.nan] * 13


def _past(signals: Signals) -> list[float]:
    loss_8, loss_32, loss_128 = (signals.loss[8].value, signals.loss[32].value, signals.loss[128].value)
    grad_8, grad_32, grad_128 = (signals.log_grad[8].value, signals.log_grad[32].value, signals.log_grad[128].value)
    noise, grad_noise, lines = signals.noise, signals.grad_noise, signals.recent.fit()
    slope_8, slope_32, slope_128 = lines.slope_S
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
        lines.sign_changes,
        signals.last_log_grad - grad_8,
        grad_8 - grad_32,
        grad_32 - grad_128,
        _log(grad_noise) if grad_noise else math.nan,
    ]


def _log(x: float) -> float:
    return math.log(TINY if x < TINY else x)
