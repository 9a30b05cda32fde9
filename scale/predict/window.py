"""The newest losses, and the straight lines through them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Fit(NamedTuple):
    """Least-squares lines: their slopes per step, by scale, and what they leave of the newest values (about the line through
    these alone). Zeros for fewer than three values."""

    slope_S: list[float]
    left_N: np.ndarray

    @property
    def sign_changes(self) -> float:
        """Share of neighbours on opposite sides of their line, 0 to 1."""
        pairs = len(self.left_N) - 1
        if pairs < 2:
            return 0.0
        below = (self.left_N < 0.0).tobytes()
        return (below.count(b"\0\1") + below.count(b"\1\0")) / pairs


class Window:
    """The newest values, as many as the longest scale, always side by side in memory: they move through a longer array, then
    back to its start.

    Every line is fitted anew to the values themselves, so that no rounding adds up as it would in running sums: a line is
    linear in its values, so one product with a matrix gives all slopes and what is left of the newest `around` values.
    """

    def __init__(self, scales: tuple[int, ...], around: int):
        self.scales, self.around, self.size = scales, around, max(scales)
        self._room_R = np.zeros(8 * self.size)
        self._end = 0
        self._fit: Fit | None = None
        """Of the values as they are now."""
        self._full_NC = _lines(self.size, scales, around)

    def add(self, x: float) -> None:
        """The newest value."""
        self._next(x)
        self._end += 1
        self._fit = None

    def _next(self, x: float) -> None:
        if self._end == len(self._room_R):
            self._room_R[: self.size] = self._room_R[-self.size :]
            self._end = self.size
        self._room_R[self._end] = x

    def values(self) -> np.ndarray:
        """The newest last. A view: it holds until the next `add`."""
        return self._until(self._end)

    def _until(self, end: int) -> np.ndarray:
        return self._room_R[end - self.size if end > self.size else 0 : end]

    def fit(self) -> Fit:
        """Lines through the values."""
        if self._fit is None:
            self._fit = self._fitted(self.values())
        return self._fit

    def fit_with(self, x: float) -> Fit:
        """Lines as they would be if `x` were added."""
        self._next(x)
        return self._fitted(self._until(self._end + 1))

    def _fitted(self, y_N: np.ndarray) -> Fit:
        full = len(y_N) == self.size
        found = (self._full_NC if full else _lines(len(y_N), self.scales, self.around)).dot(y_N)
        scales = len(self.scales)
        return Fit(found[:scales].tolist(), found[scales:])

    def fill(self, values: Sequence[float]) -> None:
        """These values and no others."""
        self._fit = None
        self._end = min(len(values), self.size)
        self._room_R[: self._end] = values[len(values) - self._end :]


@lru_cache(maxsize=4)
def _lines(count: int, scales: tuple[int, ...], around: int) -> np.ndarray:
    """(S + N, count): times `count` values it gives S slopes, each through as many of the newest values as its scale says,
    and the N newest values less their own line."""
    slopes_SC = np.zeros((len(scales), count))
    for slope_C, scale in zip(slopes_SC, scales, strict=True):
        n = min(scale, count)
        if n > 2:
            slope_C[count - n :] = _slope_weights(n)
    n = min(around, count)
    left_NC = np.zeros((n, count))
    if n > 2:
        x_N = np.arange(n) - (n - 1) / 2
        left_NC[:, count - n :] = np.eye(n) - 1 / n - np.outer(x_N, _slope_weights(n))
    return np.concatenate([slopes_SC, left_NC])


def _slope_weights(n: int) -> np.ndarray:
    """By which `n` values one step apart are multiplied to give the slope of their line."""
    x_N = np.arange(n) - (n - 1) / 2
    return x_N / (x_N @ x_N)
