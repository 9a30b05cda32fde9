"""Steps not worth applying: non-finite, or far outside the recent loss and gradient norm (as in OLMo-core)."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from scale.config.optim import SpikeConfig
from scale.errors import ScaleError


class SpikeFilter:
    """Judges each step against a window of the last ones. Finite outliers enter the window too, so that a lasting change
    of level is accepted after a while."""

    def __init__(self, config: SpikeConfig):
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.norms: deque[float] = deque(maxlen=config.window)
        self.in_a_row = 0

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why this step must not be applied, or None.

        Raises ScaleError after too many in a row, and where the first gradient of a run is exactly 0.
        """
        if grad_norm == 0 and not self.norms:
            raise ScaleError(
                "the gradient of every parameter is exactly 0 in the first step, so nothing would be learned "
                "(does the loss depend on the trained parameters? are all of them frozen?)"
            )
        reason = self._reason(loss, grad_norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.losses.append(loss)
            self.norms.append(grad_norm)
        return self.count(reason)

    def count(self, reason: str | None) -> str | None:
        """Count a step that is skipped for `reason`, or one that is not. Raises ScaleError after too many in a row."""
        self.in_a_row = self.in_a_row + 1 if reason else 0
        if self.in_a_row >= self.config.max_consecutive:
            raise ScaleError(
                f"{self.in_a_row} steps skipped in a row, the last for {reason}: lower optim.lr or check the data"
            )
        return reason

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        for name, value, recent in (("loss", loss, self.losses), ("gradient norm", grad_norm, self.norms)):
            if not math.isfinite(value):
                return f"non-finite {name}"
            if self.config.sigma and len(recent) >= self.config.window // 2:
                limit = np.mean(recent) + self.config.sigma * np.std(recent)
                if value > limit:
                    return f"spike: {name} {value:.4g} above {limit:.4g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "norms": list(self.norms), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.norms.clear()
        self.norms.extend(state["norms"])
        self.in_a_row = state["in_a_row"]
