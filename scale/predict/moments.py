"""What prediction is told about training, and what it says in return.

Group letters: G kinds of weights (`scale.predict.groups.KINDS`, eleven), F features (64), T steps ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroupStats:
    """One look at the weights, summed over all ranks: for each of the G kinds, fp64.

    `weights` are squared norms and products of parameters p, gradients g (clipped), smoothed drift d (per step) and
    update u (per step since the last look): columns pp, pg, pd, pu, gg, gd, gu, dd, du, uu, largest |g|, non-finite.
    `elements` counts the parameters of each kind; kinds the model lacks have none.
    """

    step: int
    table_GC: np.ndarray
    elements_G: np.ndarray


@dataclass(frozen=True)
class StepFacts:
    """A full step as the predictor hears of it, the same numbers on every rank."""

    step: int
    loss: float
    grad_norm: float
    lr_factor: float
    position: float
    """step / all steps of the run."""
    tokens: int
    seq_len: int
    skipped: bool = False
    relaxing: bool = False
    """One of the steps right after a jump, by which it is judged."""


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
    """How far the drift of some steps ago really carried, in straight lines, by kind; nan where there is none."""
    diverged: bool = False


@dataclass(frozen=True)
class Forecast:
    """What the world model expects of the next T full steps: smoothed training loss with a calibrated 90% interval."""

    loss_T: list[float]
    lower_T: list[float]
    upper_T: list[float]
    grad_norm_T: list[float]
    carry_TG: list[list[float]]
    """How far today's drift will have carried after 1..T steps, in straight lines, by kind."""
    divergence: float
    """Probability of divergence within T steps."""
    confidence: float
    """0 to 1: how narrow the interval at T is beside the noise of single steps, times the chance of no divergence."""
