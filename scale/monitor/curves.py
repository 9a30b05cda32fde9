"""What all pictures of runs share: columns, colours, smoothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette: told apart by colour-blind readers as well."""

POINTS = 500
Average = Callable[[np.ndarray], Any]
Run = Mapping[str, np.ndarray]
"""Columns by name, NaN where a row has null; `step` is never null."""


def smooth(values: np.ndarray, window: int, average: Average) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` positions and the average of the values around each, NaN left out.

    Centred, and narrower towards both ends, so that it neither lags nor bends a slope.
    """
    places = np.unique(np.linspace(0, len(values) - 1, POINTS).round().astype(int))
    averages = np.full(len(places), np.nan)
    for i, place in enumerate(places):
        reach = min(place, len(values) - 1 - place, window // 2)
        near = values[place - reach : place + reach + 1]
        near = near[np.isfinite(near)]
        if len(near):
            averages[i] = average(near)
    return places, averages
