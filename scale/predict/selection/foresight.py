"""What a piece would lose today: as it was remembered, or as a regression over all pieces foresees it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from scale.predict.packing import pack_array, unpack_array
from scale.predict.selection.history import LossHistory, Passages

FEATURES = 10
_FORGET = 0.99
"""Weight of earlier groups against the newest one: a memory of about a hundred groups."""
_PRIOR = 1.0
"""Ridge: what was never seen to matter stays near 0, so that the remembered loss is the forecast of the beginning."""


class Foresight(Protocol):
    """Hears losses in order; says what they will be."""

    def learn(self, group: int, pieces_N: np.ndarray, losses_N: np.ndarray) -> None: ...

    def scores(self, group: int, pieces_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) expected loss of each piece at `group` (+inf: before all) and (N,) its standard deviation."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Remembered:
    """The remembered loss, of a piece that was not seen that of its passage; a passage that was never seen comes before
    all."""

    def __init__(self, passages: Passages, memory: float):
        self.history = LossHistory(passages, memory)

    def learn(self, group: int, pieces_N: np.ndarray, losses_N: np.ndarray) -> None:
        self.history.update(group, pieces_N, losses_N)

    def scores(self, group: int, pieces_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        loss_N = self.history.loss_P[pieces_N].astype(np.float64)
        around_N = self.history.loss_Q[self.history.passages.of(pieces_N)]
        loss_N = np.where(np.isnan(loss_N), around_N, loss_N)
        return np.where(np.isnan(loss_N), np.inf, loss_N), np.zeros(len(pieces_N))

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state["history"])


class Foreseen:
    """Today's loss of a piece by ridge regression, learned online from every loss that is heard.

    Foreseen is the difference to the remembered loss (to the average of its source for unseen pieces) from: how hard the
    piece and its passage are among others, how far the level of losses moved since it was seen (as a difference and in
    proportion), age, trend and number of visits. The uncertainty is the standard deviation of forecasts: the variance of
    residuals (of unseen, once seen, often seen pieces) times 1 + leverage. No random numbers.
    """

    def __init__(self, passages: Passages, memory: float):
        self.history = LossHistory(passages, memory)
        self.moments_FF = np.eye(FEATURES) * _PRIOR
        self.target_F = np.zeros(FEATURES)
        self.residuals_C2 = np.full((3, 2), [1.0, 1.0])  # sum of squares and count: by visits 0, 1, more

    def learn(self, group: int, pieces_N: np.ndarray, losses_N: np.ndarray) -> None:
        if len(pieces_N) and not np.isnan(self.history.level):
            base_N, features_NF = self._features(group, pieces_N)
            change_N = losses_N - base_N
            missed_N = change_N - features_NF @ self._weights()
            kind_N = np.minimum(self.history.visits_P[pieces_N], 2)
            for column, values_N in enumerate((missed_N**2, np.ones(len(missed_N)))):
                self.residuals_C2[:, column] *= _FORGET
                self.residuals_C2[:, column] += np.bincount(kind_N, values_N, 3)
            self.moments_FF = _FORGET * self.moments_FF + (1 - _FORGET) * _PRIOR * np.eye(FEATURES)
            self.moments_FF = self.moments_FF + features_NF.T @ features_NF
            self.target_F = _FORGET * self.target_F + features_NF.T @ change_N
        self.history.update(group, pieces_N, losses_N)

    def scores(self, group: int, pieces_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if np.isnan(self.history.level):
            return np.zeros(len(pieces_N)), np.ones(len(pieces_N))
        base_N, features_NF = self._features(group, pieces_N)
        leverage_N = (features_NF * np.linalg.solve(self.moments_FF, features_NF.T).T).sum(1)
        variance_C = self.residuals_C2[:, 0] / self.residuals_C2[:, 1]
        kind_N = np.minimum(self.history.visits_P[pieces_N], 2)
        unsure_N = np.sqrt(variance_C[kind_N] * (1 + leverage_N))
        return np.maximum(base_N + features_NF @ self._weights(), 0.0), unsure_N

    def _weights(self) -> np.ndarray:
        return np.linalg.solve(self.moments_FF, self.target_F)

    def _features(self, group: int, pieces_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the loss would be if nothing had moved, and what may have moved it."""
        history = self.history
        visits_N = history.visits_P[pieces_N].astype(np.float64)
        seen_N = visits_N > 0
        source_N = history.source_S[history.passages.source_of(pieces_N)]
        source_N = np.where(np.isnan(source_N), history.level, source_N)
        loss_N, level_N = (array_P[pieces_N].astype(np.float64) for array_P in (history.loss_P, history.level_P))
        passage_N = history.passages.of(pieces_N)
        around_N = history.extra_Q[passage_N] * (1 - 1 / (1 + history.visits_Q[passage_N].astype(np.float64)))
        age_N = np.log1p(np.maximum(group - history.group_P[pieces_N], 0))
        of_seen = [
            np.ones(len(pieces_N)),
            loss_N - level_N,
            history.level - level_N,
            loss_N * (history.level / np.maximum(level_N, 1e-6) - 1),
            age_N,
            history.trend * age_N,
            1 / (1 + visits_N),
            around_N,
        ]
        of_unseen = [np.ones(len(pieces_N)), around_N]
        columns = [np.where(seen_N, column_N, 0.0) for column_N in of_seen]
        columns += [np.where(seen_N, 0.0, column_N) for column_N in of_unseen]
        return np.where(seen_N, loss_N, source_N), np.stack(columns, axis=1)

    def state_dict(self) -> dict[str, Any]:
        arrays = {name: pack_array(getattr(self, name)) for name in ("moments_FF", "target_F", "residuals_C2")}
        return {"history": self.history.state_dict(), **arrays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_state_dict(state["history"])
        for name in ("moments_FF", "target_F", "residuals_C2"):
            setattr(self, name, unpack_array(state[name]))
