"""The world model's forecast: the ensemble that looks some steps ahead while a run trains, over coarse steps.

Its moments are points at which the run grew by a fixed share (`PACE`), its action the learning rate in between, its
target the change of the smoothed log of the loss. Coarse time is the log of real time, because a loss that falls as a power of
the steps then falls evenly, and the end of a run is some tens of moments ahead instead of thousands. It knows this
run alone: a fall of the learning rate that it has not seen, it cannot foresee.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from scale.config.predict import WorldConfig
from scale.errors import UsageError
from scale.forecast.curve import Curve
from scale.predict.features import NAMES
from scale.predict.moments import Moment
from scale.predict.signals import RATE
from scale.predict.world import WorldModel
from scale.predict.world.replay import Batch
from scale.predict.world.rssm import split
from scale.predict.world.training import filtered

PACE = 0.04
"""Growth of log(step) from one coarse moment to the next."""
SMOOTH = 5
"""Moments that a smoothed loss looks back over."""
UPDATES = 60
"""Of the ensemble, over all that is known."""
SETTINGS = WorldConfig(members=5, hidden=16, latent=4, bptt=8, train_every=UPDATES, paths=16)
LEAST_MOMENTS = 12
"""Coarse moments without which there is nothing to learn from."""
CONFIDENT = 2 * 1.645
"""Width of a 90% interval in standard deviations."""


class CoarseCurve:
    """The known part of a curve in coarse moments: smoothed log losses, the learning rate before each, their steps."""

    def __init__(self, curve: Curve):
        self.curve = curve
        first = curve.bins.step_B[0]
        count = int(math.log(curve.last / first) / PACE)
        self._log_J = np.log(curve.loss_N)
        ends_J = curve.last * np.exp(-PACE * np.arange(count - SMOOTH + 1, -1, -1))
        self.step_J = ends_J * math.exp(-PACE * SMOOTH / 2)
        """Middle of what each is an average over."""
        self.loss_J = self._smoothed(ends_J)
        self.lr_J = self.lr(self.step_J)

    def lr(self, step_M: np.ndarray) -> np.ndarray:
        """Learning rate at each step (M), as a factor of its peak."""
        return np.interp(step_M, np.arange(1, self.curve.steps + 1), self.curve.lr_T)

    def ahead(self) -> np.ndarray:
        """Steps of the moments after the known ones; the last is at the end of the run or beyond it."""
        count = math.ceil(math.log(self.curve.steps / self.step_J[-1]) / PACE)
        return self.step_J[-1] * np.exp(PACE * np.arange(1, count + 1))

    def moments(self) -> list[Moment]:
        """What the world model learns from: each change of the smoothed loss, over the learning rate of its stretch.

        The world model's baseline moves by `RATE` of the distance of a loss from it; `loss` is the one for which it
        moves to the next smoothed loss.
        """
        change_J = np.diff(self.loss_J) / RATE
        scale = float(np.sqrt(np.mean(change_J**2))) + 1e-6
        return [
            Moment(
                step=j + 1,
                features_F=self._features(change_J / scale, j),
                action_A=[float(self.lr_J[j + 1]), 0.0, 0.0],
                loss=float(self.loss_J[j] + change),
                baseline=float(self.loss_J[j]),
                noise=scale,
                grad_norm=1.0,
                grad_baseline=1.0,
            )
            for j, change in enumerate(change_J)
        ]

    def _features(self, change_J: np.ndarray, j: int) -> list[float]:
        """Known before change j: earlier changes (last, recent, all), the learning rate now, the place in the run."""
        before = change_J[:j]
        changes = [float(part.mean()) if len(part) else 0.0 for part in (before[-1:], before[-SMOOTH:], before)]
        place = math.log(self.step_J[j] / self.curve.steps)
        known = [*changes, float(self.lr_J[j]), place]
        return known + [0.0] * (len(NAMES) - len(known))

    def _smoothed(self, ends_J: np.ndarray) -> np.ndarray:
        """Average log loss of the stretch up to each end; where no loss of it is known, that of its neighbours."""
        sum_N = np.concatenate([[0.0], np.cumsum(self._log_J)])
        last_J = np.searchsorted(self.curve.step_N, ends_J, side="right")
        first_J = np.searchsorted(self.curve.step_N, ends_J * math.exp(-PACE * SMOOTH), side="right")
        known = last_J > first_J
        mean_J = (sum_N[last_J] - sum_N[first_J])[known] / (last_J - first_J)[known]
        return np.interp(ends_J, ends_J[known], mean_J)


class WorldModelForecast:
    """The ensemble, trained on the known part of a curve. Raises UsageError if that is too short."""

    def __init__(self, curve: Curve, seed: int):
        coarse = CoarseCurve(curve)
        moments = coarse.moments()
        if len(moments) < LEAST_MOMENTS:
            raise UsageError(f"the world model needs {LEAST_MOMENTS} coarse moments, and {len(moments)} are known")
        world = WorldModel(SETTINGS, seed)
        for moment in moments:
            world.observe(moment)
        for _ in range(UPDATES):
            world.training.update(world.replay)
        ahead = coarse.ahead()
        predicted = world.forecast([float(factor) for factor in coarse.lr(ahead)])
        assert predicted is not None, "it was updated often enough"
        self._log_step = np.log(np.append(coarse.step_J[-1], ahead))
        self._log_loss = np.append(coarse.loss_J[-1], predicted.loss_T)
        widths_T = (np.array(predicted.upper_T) - predicted.lower_T) / (CONFIDENT * world.calibration.widening)
        self._spread = np.append(0.0, widths_T)
        self.error = _one_ahead(world, moments)

    def log_loss(self, step_M: np.ndarray) -> np.ndarray:
        """Log of the loss at each step (M) from the last known one on."""
        return np.interp(np.log(step_M), self._log_step, self._log_loss)

    def spread(self, step_M: np.ndarray) -> np.ndarray:
        """Standard deviation of the sampled futures of all members there, of the log of the loss."""
        return np.interp(np.log(step_M), self._log_step, self._spread)


def _one_ahead(world: WorldModel, moments: Sequence[Moment]) -> float:
    """Root mean square error, in log of the loss, of what the ensemble says of the next moment wherever it knew it since."""
    with torch.no_grad():
        weights = world.model.weights()
        rows_LW = world.replay.newest(len(moments))
        batch = Batch.of(rows_LW.expand(weights.members, 1, *rows_LW.shape))
        states, _ = filtered(world.model, weights, batch, None)
        predicted = [split(world.model.heads(weights, s.h_EBH, s.z_EBZ)).loss.mean.mean() for s in states]
    error_L = torch.stack(predicted) - batch.loss[0, 0]
    return float(error_L.square().mean().sqrt()) * moments[0].noise * RATE
