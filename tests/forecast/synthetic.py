"""Curves whose law is known: schedules, the Multi-Power Law summed step by step, and noise."""

from __future__ import annotations

import numpy as np

from scale.config.optim import ScheduleConfig
from scale.forecast.curve import Curve
from scale.train.schedule import lr_factor, warmup_steps

LAW = {"L0": 1.1, "A": 4.0, "alpha": 0.35, "B": 0.4, "C": 0.11, "beta": 0.59, "gamma": 0.64}


def factors(steps: int, **schedule: object) -> tuple[np.ndarray, int]:
    """Learning rates (steps) as factors of the peak, and the length of the warm-up."""
    config = ScheduleConfig.model_validate({"kind": "wsd", "warmup": 0.05, "final": 0.0, "decay": 0.3} | schedule)
    lr_T = np.array([lr_factor(config, step, steps) for step in range(1, steps + 1)])
    return lr_T, warmup_steps(config, steps)


def summed_law(lr_T: np.ndarray, warmup: int, law: dict[str, float]) -> np.ndarray:
    """The law of arXiv 2503.12811, equation by equation, for every step after the warm-up (nan before)."""
    loss_T = np.full(len(lr_T), np.nan)
    for t in range(warmup + 1, len(lr_T) + 1):
        gained = 0.0
        for k in range(warmup + 1, t + 1):
            before, now = lr_T[k - 2] if k > 1 else 0.0, lr_T[k - 1]
            if k > 1 and before != now:
                x = max(now, 0.01) ** -law["gamma"] * lr_T[k - 1 : t].sum()
                gained += (before - now) * (1 - (law["C"] * x + 1) ** -law["beta"])
        loss_T[t - 1] = law["L0"] + law["A"] * lr_T[:t].sum() ** -law["alpha"] - law["B"] * gained
    return loss_T


def curve(loss_T: np.ndarray, lr_T: np.ndarray, warmup: int, noise: float = 0.0, seed: int = 0) -> Curve:
    """All steps of a run whose losses are these, times seeded log-normal noise; a fall from 5.5 in the warm-up."""
    rng = np.random.default_rng(seed)
    early_T = np.linspace(5.5, loss_T[warmup] * 1.02, len(loss_T))
    whole_T = np.where(np.isnan(loss_T), early_T, loss_T) * np.exp(noise * rng.standard_normal(len(loss_T)))
    return Curve(np.arange(1, len(loss_T) + 1), whole_T, lr_T, warmup)


def fast_law(lr_T: np.ndarray, warmup: int, law: dict[str, float]) -> np.ndarray:
    """`summed_law` for long runs, in one matrix: O(steps^2) memory."""
    sum_T = np.cumsum(lr_T)
    after = np.arange(warmup, len(lr_T))
    fall_K = lr_T[after - 1] - lr_T[after]
    fall_K[0] = 0.0 if warmup == 0 else fall_K[0]
    since_TK = np.maximum(sum_T[after][:, None] - (sum_T - lr_T)[after][None], 0)
    gain_TK = 1 - (law["C"] * np.maximum(lr_T[after], 0.01) ** -law["gamma"] * since_TK + 1) ** -law["beta"]
    gain_TK[after[:, None] < after[None]] = 0.0
    loss_T = np.full(len(lr_T), np.nan)
    loss_T[after] = law["L0"] + law["A"] * sum_T[after] ** -law["alpha"] - law["B"] * gain_TK @ fall_K
    return loss_T
