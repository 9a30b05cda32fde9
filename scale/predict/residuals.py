"""What past jumps taught: the gain that predictions missed in similar states, and by how much carry was off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from scale.predict.packing import pack_array, unpack_array

SIMILAR = 10
"""Nearest states whose residuals make a correction."""
FADING = 0.95 ** (1 / 100)
"""Weight that a residual keeps with each step of its age: .95 per hundred."""
BOUNDS = (0.25, 2.0)
"""Of corrections of carry."""
PACE = 0.2
"""Weight of the newest observation in a correction of carry."""


class Residuals:
    """Real minus predicted gain of up to `capacity` jumps, found again by the features of their states."""

    def __init__(self, features: int, capacity: int = 1000):
        self.capacity = capacity
        self.features_NF = np.zeros((0, features))
        self.residual_N = np.zeros(0)
        self.step_N = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.residual_N)

    def add(self, step: int, features_F: list[float], predicted: float, real: float) -> None:
        """The gain of a jump made at `step`. The oldest goes when the store is full.

        Raises ValueError for numbers that are not finite.
        """
        if not np.isfinite([predicted, real, *features_F]).all():
            raise ValueError(f"residual of step {step}: predicted {predicted}, real {real} and features must be finite")
        self.features_NF = np.vstack([self.features_NF, features_F])[-self.capacity :]
        self.residual_N = np.append(self.residual_N, real - predicted)[-self.capacity :]
        self.step_N = np.append(self.step_N, step)[-self.capacity :]

    def correction(self, step: int, features_F: list[float]) -> float:
        """To be added to a predicted gain: mean residual of the most similar states (Euclid), older ones weigh less."""
        if not len(self):
            return 0.0
        distance_N = np.square(self.features_NF - np.asarray(features_F)).sum(1)
        nearest = np.argsort(distance_N, kind="stable")[:SIMILAR]
        weight_N = FADING ** np.maximum(step - self.step_N[nearest], 0)
        return float(weight_N @ self.residual_N[nearest] / weight_N.sum())

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {name: pack_array(getattr(self, name)) for name in ("features_NF", "residual_N", "step_N")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name in ("features_NF", "residual_N", "step_N"):
            setattr(self, name, unpack_array(state[name]))


class CarryCorrection:
    """By what predicted carry is multiplied: for all weights, times for the kind, times for the layer.

    Each is a moving average of real / predicted carry after what the coarser ones explain, within `BOUNDS`; so is
    their product.
    """

    def __init__(self) -> None:
        self.overall = 1.0
        self.kinds: dict[str, float] = {}
        self.layers: dict[str, float] = {}

    def factor(self, kind: str, layer: str) -> float:
        """For weights of `kind` in `layer`; 1 where nothing was learned."""
        return _bounded(self._overall_and_kind(kind) * self.layers.get(layer, 1.0))

    def learn(self, ratios: Mapping[tuple[str, str], float]) -> None:
        """Real carry over the uncorrected prediction, by (kind, layer), from one jump. Others than finite ones are left."""
        known = {place: ratio for place, ratio in ratios.items() if np.isfinite(ratio)}
        if not known:
            return
        self.overall = _moved(self.overall, float(np.mean(list(known.values()))))
        for kind in sorted({kind for kind, _ in known}):
            left = np.mean([ratio for (k, _), ratio in known.items() if k == kind]) / self.overall
            self.kinds[kind] = _moved(self.kinds.get(kind, 1.0), float(left))
        for layer in sorted({layer for _, layer in known}):
            left = np.mean([ratio / self._overall_and_kind(k) for (k, n), ratio in known.items() if n == layer])
            self.layers[layer] = _moved(self.layers.get(layer, 1.0), float(left))

    def _overall_and_kind(self, kind: str) -> float:
        return self.overall * self.kinds.get(kind, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"overall": self.overall, "kinds": dict(self.kinds), "layers": dict(self.layers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.overall = state["overall"]
        self.kinds, self.layers = dict(state["kinds"]), dict(state["layers"])


def _bounded(factor: float) -> float:
    low, high = BOUNDS
    return min(max(factor, low), high)


def _moved(average: float, seen: float) -> float:
    return _bounded(average + PACE * (_bounded(seen) - average))
