"""What prediction is told about training, and what it says in return.

Letters: G kinds of parameters (`scale.predict.kinds.KINDS`, eleven), F features (64), T steps ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Statistics:
    """Sums over the parameters of each kind and over all ranks, taken in one step, fp64.

    Columns of `table_GC`: squared norms and products of parameters p, clipped gradients g, smoothed update d (per step)
    and update u (per step, since the statistics before): pp, pg, pd, pu, gg, gd, gu, dd, du, uu, largest |g|, non-finite.
    `elements_G` counts parameters; kinds that the model lacks have none.
    """

    step: int
    table_GC: np.ndarray
    elements_G: np.ndarray

    def update_cosine(self) -> float:
        """Cosine of the last update with the smoothed earlier ones, over all parameters; 0 if unknown."""
        total_C = self.table_GC.sum(0)
        norms = float(total_C[7] * total_C[9]) ** 0.5
        return float(total_C[8]) / norms if norms > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class ComingStep:
    """What is known of a full step before it is made."""

    step: int
    lr_factor: float
    position: float
    """step / all steps of the run."""
    tokens: int
    seq_len: int
    settling: bool = False
    """One of the steps after a jump, before its acceptance test."""


@dataclass(frozen=True, kw_only=True)
class MadeStep(ComingStep):
    """A full step and what it brought, the same numbers on every rank."""

    loss: float
    grad_norm: float
    skipped: bool = False


@dataclass(frozen=True)
class Moment:
    """What the world model learns from: the state of training just before a step, and what the step then brought."""

    step: int
    features_F: list[float]
    """Known before the step; nothing in it depends on what follows here."""
    action_A: list[float]
    """lr factor; of a jump since the last moment: distance per step in straight lines at lr factor 1, and steps / 100."""
    loss: float
    baseline: float
    """Average of earlier losses."""
    noise: float
    """Standard deviation of losses around their average."""
    grad_norm: float
    grad_baseline: float
    carry_G: list[float] | None = None
    """How far the smoothed update of some steps ago really carried, in straight lines, by kind; nan where there is none."""
    diverged: bool = False


@dataclass(frozen=True)
class StepForecast:
    """What the world model expects of the next T full steps: smoothed training loss with a calibrated 90% interval."""

    loss_T: list[float]
    lower_T: list[float]
    upper_T: list[float]
    grad_norm_T: list[float]
    carry_TG: list[list[float]]
    """How far today's smoothed update will have carried after 1..T steps, in straight lines, by kind."""
    divergence: float
    """Probability of divergence within T steps."""
    confidence: float
    """0 to 1: how narrow the interval at T is beside the noise of single steps, times the chance of no divergence."""
