"""Which jump to make, if any: LinUCB.

Li et al. 2010, arXiv 1003.0146, algorithm 1, disjoint arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scale.predict.packing import pack_array, unpack_array

Arm = tuple[int, str]
"""Horizon in steps and direction."""
STAY: Arm = (0, "stay")
"""Full steps. Rewards are gains over it, so its own is 0 by definition, without uncertainty."""
ALPHA = 1.0
"""Standard errors of optimism."""
L2 = 1.0


class Bandit:
    """Learns the reward of every arm as a linear function of the context. Contexts need a constant 1 of their own."""

    def __init__(self, arms: Sequence[Arm], width: int):
        if STAY in arms or len(set(arms)) < len(arms) or not arms:
            raise ValueError(f"arms {list(arms)}: name each one once; staying is always among the choices")
        self.arms = list(arms)
        self.gram_KDD = np.tile(L2 * np.eye(width), (len(arms), 1, 1))
        self.moment_KD = np.zeros((len(arms), width))
        self.learned_K = np.zeros(len(arms), np.int64)

    def choose(self, context_D: Sequence[float], among: Sequence[Arm] | None = None, stay: bool = True) -> Arm:
        """The arm with the highest upper bound, the first among equals; STAY if none is above 0 and staying is allowed.

        `among`: the arms that can be taken now, by default all.
        """
        x_D = self._checked(context_D)
        bound_K = self._means(x_D) + ALPHA * np.sqrt(np.linalg.solve(self.gram_KDD, x_D[None, :, None])[..., 0] @ x_D)
        if among is not None:
            bound_K = np.where([arm in among for arm in self.arms], bound_K, -np.inf)
        best = int(bound_K.argmax())
        return self.arms[best] if bound_K[best] > 0 or not stay else STAY

    def learn(self, arm: Arm, context_D: Sequence[float], reward: float) -> None:
        """What an arm brought over staying. Raises ValueError for STAY, unknown arms and numbers that are not finite."""
        if arm not in self.arms:
            raise ValueError(f"arm {arm}: learned are {self.arms}; staying brings 0 by definition")
        if not np.isfinite(reward):
            raise ValueError(f"reward {reward} of {arm}: must be finite")
        x_D, k = self._checked(context_D), self.arms.index(arm)
        self.gram_KDD[k] += np.outer(x_D, x_D)
        self.moment_KD[k] += reward * x_D
        self.learned_K[k] += 1

    def _means(self, x_D: np.ndarray) -> np.ndarray:
        return np.linalg.solve(self.gram_KDD, self.moment_KD[..., None])[..., 0] @ x_D

    def _checked(self, context_D: Sequence[float]) -> np.ndarray:
        x_D = np.asarray(context_D, np.float64)
        if x_D.shape != self.moment_KD.shape[1:] or not np.isfinite(x_D).all():
            raise ValueError(f"context {list(context_D)}: {self.moment_KD.shape[1]} finite numbers are needed")
        return x_D

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        arrays = {name: pack_array(getattr(self, name)) for name in _ARRAYS}
        return {"arms": [list(arm) for arm in self.arms], **arrays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises ValueError if the arms are others."""
        saved = [(number, name) for number, name in state["arms"]]
        if saved != self.arms:
            raise ValueError(f"saved arms {saved} are not {self.arms}")
        for name in _ARRAYS:
            setattr(self, name, unpack_array(state[name]))


_ARRAYS = ("gram_KDD", "moment_KD", "learned_K")
