"""What the world model is told of the last look at the weights: four numbers of each kind."""

from __future__ import annotations

import math

import numpy as np

from scale.predict.groups import KINDS
from scale.predict.moments import GroupStats

PER_KIND = {
    "drift": "log of the norm of the drift of {kind} relative to the norm of the weights",
    "drift_gradient": "cosine between drift and gradient of {kind}",
    "update_drift": "cosine between the update of {kind} and its drift, the smoothed earlier updates",
    "update": "log of the RMS update of {kind} per unit of lr: for AdamW the RMS of m / sqrt(v)",
}
_HALF_G = np.full(len(KINDS), 0.5)


class LookNumbers:
    """Four numbers of each kind, written into `raw_R` (rows of kinds). `lr_factor`: of the update that was looked at."""

    def __init__(self, raw_R: np.ndarray):
        self._raw_GN = raw_R.reshape(len(KINDS), len(PER_KIND))
        self._update_G = self._raw_GN[:, -1]
        self._logs_2G, self._norms_2G = np.zeros((2, 2, len(KINDS)))
        self._per_lr_G = self._logs_2G[1]
        """Of the update, before the learning rate is taken out of it."""
        self._known_G, self._shift_G = np.zeros((2, len(KINDS)))
        self._log_lr = np.zeros(())
        self._stats: GroupStats | None = None
        self._lr_factor = 0.0
        self._usual = self._complete = False

    def still(self, stats: GroupStats | None, lr_factor: float) -> bool:
        """Is it the look of the last call? If so, its numbers stand there, for this learning rate."""
        if stats is not self._stats or not self._usual:
            return False
        if lr_factor != self._lr_factor:
            if not _usual(lr_factor):
                return False
            self._lr_factor = lr_factor
            self._log_lr[()] = np.log(lr_factor)
            shift = self._log_lr
            if not self._complete:
                shift = np.multiply(self._known_G, self._log_lr, self._shift_G)
            np.subtract(self._per_lr_G, shift, self._update_G)
        return True

    def look(self, stats: GroupStats | None, lr_factor: float) -> None:
        """All of them anew, nan where there are none: all sums over a kind without elements are 0."""
        self._stats, self._lr_factor, self._usual = stats, lr_factor, _usual(lr_factor)
        if stats is None:
            self._raw_GN.fill(math.nan)
            return
        table_CG, raw_GN = np.asarray(stats.table_GC, np.float64).T, self._raw_GN
        gg_G, gd_G, dd_G, du_G, uu_G = table_CG[4], table_CG[5], table_CG[7], table_CG[8], table_CG[9]
        elements_G, logs_2G, norms_2G = np.asarray(stats.elements_G, np.float64), self._logs_2G, self._norms_2G
        with np.errstate(all="ignore"):
            np.divide(dd_G, table_CG[0], logs_2G[0])
            np.divide(uu_G, elements_G, logs_2G[1])
            np.multiply(np.log(logs_2G, logs_2G), _HALF_G, logs_2G)
            np.multiply(dd_G, gg_G, norms_2G[0])
            np.multiply(dd_G, uu_G, norms_2G[1])
            np.sqrt(norms_2G, norms_2G)
            raw_GN[:, 0] = logs_2G[0]
            np.divide(gd_G, norms_2G[0], raw_GN[:, 1])
            np.divide(du_G, norms_2G[1], raw_GN[:, 2])
            np.subtract(self._per_lr_G, np.log(lr_factor), self._update_G)

    def known(self, known_R: np.ndarray) -> None:
        """Which of them are. The others keep what was put in their place."""
        known_G = known_R[len(PER_KIND) - 1 :: len(PER_KIND)]
        self._known_G[:] = known_G
        self._complete = bool(known_G.all())
        np.copyto(self._per_lr_G, self._update_G, where=~known_G)


def _usual(lr_factor: float) -> bool:
    """Is its logarithm finite, and too small to bring a number beyond WIDEST?"""
    return 1e-100 < lr_factor < 1e100
