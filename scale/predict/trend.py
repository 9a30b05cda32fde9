"""Least-squares lines through the newest losses."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Trend(NamedTuple):
    """Slopes per step, by scale, and the residuals of the newest values about a line of their own. Zeros for fewer than
    three values."""

    slope_S: list[float]
    residual_N: np.ndarray

    @property
    def sign_changes(self) -> float:
        """Share of neighbouring residuals of opposite sign, 0 to 1."""
        pairs = len(self.residual_N) - 1
        if pairs < 2:
            return 0.0
        below_N = self.residual_N < 0.0
        return int((below_N[1:] != below_N[:-1]).sum()) / pairs


class RecentLosses:
    """As many losses as the longest scale. Lines are fitted anew each time, so that no rounding adds up."""

    def __init__(self, scales: tuple[int, ...], around: int):
        """`around`: how many of the newest losses have residuals."""
        self.scales, self.around = scales, around
        self.values: deque[float] = deque(maxlen=max(scales))
        self._trend: Trend | None = None

    def add(self, loss: float) -> None:
        self.values.append(loss)
        self._trend = None

    def trend(self) -> Trend:
        """Of the losses as they are now."""
        if self._trend is None:
            self._trend = self._fitted(list(self.values))
        return self._trend

    def trend_with(self, loss: float) -> Trend:
        """As it would be with one more loss."""
        return self._fitted([*self.values, loss][-max(self.scales) :])

    def _fitted(self, losses: Sequence[float]) -> Trend:
        found = _lines(len(losses), self.scales, self.around).dot(np.asarray(losses, np.float64))
        return Trend(found[: len(self.scales)].tolist(), found[len(self.scales) :])

    def fill(self, losses: Sequence[float]) -> None:
        """These losses and no others."""
        self.values.clear()
        self.values.extend(losses)
        self._trend = None


@lru_cache(maxsize=4)
def _lines(count: int, scales: tuple[int, ...], around: int) -> np.ndarray:
    """(S + N, count): a fit is linear in its values, so one product gives all slopes and the residuals of the newest N."""
    slopes_SC = np.zeros((len(scales), count))
    for slope_C, scale in zip(slopes_SC, scales, strict=True):
        n = min(scale, count)
        if n > 2:
            slope_C[count - n :] = _slope_weights(n)
    n = min(around, count)
    residuals_NC = np.zeros((n, count))
    if n > 2:
        x_N = np.arange(n) - (n - 1) / 2
        residuals_NC[:, count - n :] = np.eye(n) - 1 / n - np.outer(x_N, _slope_weights(n))
    return np.concatenate([slopes_SC, residuals_NC])


def _slope_weights(n: int) -> np.ndarray:
    """By which `n` values one step apart are multiplied to give the slope of their line."""
    x_N = np.arange(n) - (n - 1) / 2
    return x_N / (x_N @ x_N)
