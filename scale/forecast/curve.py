"""What a forecast starts from: the losses of a run so far, and the learning rate of the whole run.

Letters: N known steps, T steps of the run, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from scale.errors import UsageError

BINS = 64
"""Averages that a law is fitted to, over equally many steps each: fitting a million steps costs what fitting 64 does."""
TRANSIENT = 0.06
"""Share of the run, after the warm-up, in which a model still learns how frequent tokens are; no law holds there."""
LEAST = 24
"""Usable losses without which nothing is forecast."""


@dataclass(frozen=True)
class Curve:
    """`loss_N` at the steps `step_N` (from 1, rising); `lr_T` is the learning rate of steps 1..T as a factor of its peak."""

    step_N: np.ndarray
    loss_N: np.ndarray
    lr_T: np.ndarray
    warmup: int

    @property
    def steps(self) -> int:
        """Length of the run."""
        return len(self.lr_T)

    @property
    def last(self) -> int:
        """The last step with a known loss."""
        return int(self.step_N[-1])

    @property
    def window(self) -> int:
        """Steps whose average is called "the loss at" their last one: 2% of the run, at least 20, at most a fifth."""
        return max(1, min(max(20, self.steps // 50), self.steps // 5))

    @property
    def first(self) -> int:
        """Steps up to here are warm-up or transient, and not fitted."""
        return self.warmup + round(TRANSIENT * self.steps)

    def until(self, step: int) -> Curve:
        """The same run as it was known after `step`."""
        known = self.step_N <= step
        return replace(self, step_N=self.step_N[known], loss_N=self.loss_N[known])

    def near(self, step: int) -> np.ndarray:
        """The `window` steps that end with `step`."""
        return np.arange(max(1, step - self.window + 1), step + 1)

    def measured(self, step: int) -> float:
        """Average of the known losses of the window that ends with `step`; nan if less than half of it is known."""
        inside = (self.step_N > step - self.window) & (self.step_N <= step)
        return float(self.loss_N[inside].mean()) if 2 * inside.sum() >= self.window else math.nan

    @property
    def usable(self) -> int:
        """How many of the known losses a law is fitted to."""
        return int((self.step_N > self.first).sum())

    @cached_property
    def bins(self) -> Bins:
        """The usable losses in at most `BINS` averages. Raises UsageError if there are too few."""
        after = self.step_N > self.first
        step_N, loss_N = self.step_N[after].astype(np.float64), self.loss_N[after]
        if len(loss_N) < LEAST:
            raise UsageError(
                f"{len(loss_N)} losses after step {self.first} (warm-up and transient): a forecast needs {LEAST} "
                f"(wait until about step {self.first + LEAST})"
            )
        count = min(BINS, len(loss_N) // 3)
        parts = np.array_split(np.arange(len(loss_N)), count)
        sizes_B = np.array([len(part) for part in parts])
        noise = float(np.std(np.diff(np.log(loss_N))) / math.sqrt(2))  # differences of neighbours hold no trend
        return Bins(
            step_B=np.array([step_N[part].mean() for part in parts]),
            log_B=np.array([math.log(loss_N[part].mean()) for part in parts]),
            noise_B=noise / np.sqrt(sizes_B),
            noise=noise,
        )


@dataclass(frozen=True)
class Bins:
    """Averages of losses. `noise` is the standard deviation of the log of one step's loss, `noise_B` of a bin's."""

    step_B: np.ndarray
    log_B: np.ndarray
    noise_B: np.ndarray
    noise: float


def curve_of(rows: Iterable[Mapping[str, Any]], lr_T: np.ndarray, warmup: int) -> Curve:
    """The training losses of real, applied steps among `rows` of a metrics.jsonl; all others are left out.

    A predicted step has no measured loss, a skipped one did not move the weights, step 0 only scores. Held-out losses are
    not used: they are measured too rarely to fit a law. The schedule covers all steps of the run.
    """
    known = [(row["step"], row["loss"]) for row in rows if _is_real(row) and row["step"] <= len(lr_T)]
    step_N = np.array([step for step, _ in known], dtype=np.int64)
    loss_N = np.array([loss for _, loss in known], dtype=np.float64)
    return Curve(step_N, loss_N, np.asarray(lr_T, dtype=np.float64), warmup)


def _is_real(row: Mapping[str, Any]) -> bool:
    loss = row.get("loss")
    applied = row.get("phase") not in ("predict", "skipped") and not row.get("was_predicted") and not row.get("skipped")
    return applied and row["step"] > 0 and isinstance(loss, int | float) and math.isfinite(loss) and loss > 0
