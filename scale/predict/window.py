"""The newest losses, and the straight lines through them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np


class Window:
    """The newest `size` values, always side by side in memory: they move through a longer array, then back to its start.

    Every line is fitted anew to the values themselves, so that no rounding adds up as it would in running sums.
    """

    def __init__(self, size: int):
        self.size = size
        self._room_R = np.zeros(8 * size)
        self._end = 0
        self._lines: dict[int, Line] = {}
        self._slopes: dict[int, float] = {}
        """Of the values as they are now."""

    def add(self, x: float) -> None:
        """The newest value."""
        self.with_next(x, 1)
        self._end += 1
        self._slopes.clear()

    def with_next(self, x: float, n: int) -> np.ndarray:
        """The newest `n` values if `x` were added; the next call overwrites it."""
        if self._end == len(self._room_R):
            self._room_R[: self.size] = self._room_R[-self.size :]
            self._end = self.size
        self._room_R[self._end] = x
        return self._room_R[max(self._end + 1 - n, 0) : self._end + 1]

    def newest(self, n: int) -> np.ndarray:
        """Up to `n` values, the newest last. A view: it holds until the next `add`."""
        return self._room_R[self._end - n if self._end > n else 0 : self._end]

    def line(self, n: int) -> Line:
        """For fitting `n` values."""
        found = self._lines.get(n)
        if found is None:
            found = self._lines[n] = Line(n)
        return found

    def slope(self, n: int) -> float:
        """Of the line through up to `n` newest values."""
        found = self._slopes.get(n)
        if found is None:
            y_N = self.newest(n)
            found = self._slopes[n] = self.line(len(y_N)).slope(y_N)
        return found

    def sign_changes(self, n: int) -> float:
        """Of up to `n` newest values around their line."""
        y_N = self.newest(n)
        return self.line(len(y_N)).sign_changes(y_N, self.slope(n))

    def fill(self, values: Sequence[float]) -> None:
        """These values and no others."""
        self._slopes.clear()
        self._end = min(len(values), self.size)
        self._room_R[: self._end] = values[len(values) - self._end :]


@cache
def _centred(n: int) -> tuple[np.ndarray, float]:
    """Places of `n` values around their middle, and the sum of their squares."""
    x_N = np.arange(n) - (n - 1) / 2
    return x_N, float(x_N @ x_N)


class Line:
    """Least squares through `n` values one step apart, with memory of its own for what is left of them."""

    def __init__(self, n: int):
        self._x_N, self._square = _centred(n)

    @cached_property
    def _left_N(self) -> np.ndarray:
        return np.zeros_like(self._x_N)

    @cached_property
    def _scratch_N(self) -> np.ndarray:
        return np.zeros_like(self._x_N)

    @cached_property
    def _neighbours(self) -> tuple[np.ndarray, ...]:
        """The later and the earlier ones of what is left, their products, zeros, and which products are below."""
        products_M = np.zeros(len(self._x_N) - 1)
        return self._left_N[1:], self._left_N[:-1], products_M, np.zeros_like(products_M), products_M < 0

    def slope(self, y_N: np.ndarray) -> float:
        """Per step; 0 for fewer than three values."""
        return float(self._x_N.dot(y_N)) / self._square if len(y_N) > 2 else 0.0

    def left(self, y_N: np.ndarray, slope: float) -> np.ndarray:
        """The values less their line; zeros for fewer than three. The next call overwrites it."""
        if len(y_N) < 3:
            return self._left_N
        self._scratch_N.fill(np.add.reduce(y_N) / len(y_N))
        np.subtract(y_N, self._scratch_N, self._left_N)
        self._scratch_N.fill(slope)
        np.multiply(self._x_N, self._scratch_N, self._scratch_N)
        return np.subtract(self._left_N, self._scratch_N, self._left_N)

    def sign_changes(self, y_N: np.ndarray, slope: float) -> float:
        """Share of neighbours on opposite sides of the line of this slope, 0 to 1."""
        if len(y_N) < 3:
            return 0.0
        self.left(y_N, slope)
        later, earlier, products, none, changed = self._neighbours
        np.multiply(later, earlier, products)
        np.less(products, none, changed)
        return int(np.count_nonzero(changed)) / len(changed)
