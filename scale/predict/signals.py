"""Running statistics of full steps, and what in a step counts as divergence."""

from __future__ import annotations

import math
from typing import Any

from scale.predict.moments import MadeStep, Moment
from scale.predict.trend import RecentLosses

SCALES = (8, 32, 128)
"""Steps that the averages and slopes look back."""
BASELINE = 8
"""The scale of the average that forecasts are made of: short, so that it hardly lags."""
RATE = 2 / (BASELINE + 1)
"""Weight of the newest loss in the baseline."""
TRUSTED = 16
"""Full steps before anything but NaN and infinity counts as divergence."""
GRADIENT_RANGE = (0.01, 10.0)
"""Gradient norms outside of these multiples of their baseline count as divergence."""
PREDICTION_ERROR = 0.2
OSCILLATION = (0.8, 0.1)
"""Share of sign changes, and amplitude relative to the loss, that make a strong oscillation. White noise changes sign
half of the time."""
OSCILLATING = 32
"""Losses that oscillation is seen in."""
TINY = 1e-12


class Average:
    """Exponential moving average over about `scale` values; the plain mean of the first ones."""

    def __init__(self, scale: int):
        self.rate = 2 / (scale + 1)
        self.seen, self.value = 0, 0.0

    def add(self, x: float) -> None:
        self.seen = seen = self.seen + 1
        first = 1 / seen
        self.value += (first if first > self.rate else self.rate) * (x - self.value)


class Spread:
    """Standard deviation around a moving mean over about `scale` values, so that a steady trend is not noise."""

    def __init__(self, scale: int):
        self.mean, self.square = Average(scale), Average(scale)

    def add(self, x: float) -> None:
        self.mean.add(x)
        self.square.add((x - self.mean.value) ** 2)

    @property
    def value(self) -> float:
        return math.sqrt(self.square.value)


class Signals:
    """What is known of training between two steps. `update` with every full step, in order."""

    def __init__(self, sigma: float):
        self.sigma = sigma
        self.loss = {scale: Average(scale) for scale in SCALES}
        self.log_grad = {scale: Average(scale) for scale in SCALES}
        self._noise, self._grad_noise = Spread(32), Spread(32)
        self.recent = RecentLosses(SCALES, OSCILLATING)
        self.last_loss = self.last_log_grad = self.last_lr = 0.0
        self.steps = 0
        self.since_jump = 0

    def update(self, facts: MadeStep) -> None:
        """Take in a full step. Skipped and non-finite ones only count; settle steps do not teach the noise."""
        self.steps += 1
        self.since_jump += 1
        self.last_lr = facts.lr_factor
        if facts.skipped or not (math.isfinite(facts.loss) and math.isfinite(facts.grad_norm)):
            return
        log_grad = math.log(max(facts.grad_norm, TINY))
        if self.seen and not facts.settling:
            self._noise.add(facts.loss - self.baseline)
            self._grad_noise.add(log_grad - self.log_grad[BASELINE].value)
        for scale in SCALES:
            self.loss[scale].add(facts.loss)
            self.log_grad[scale].add(log_grad)
        self.recent.add(facts.loss)
        self.last_loss, self.last_log_grad = facts.loss, log_grad

    def jumped(self) -> None:
        """A jump was taken and kept."""
        self.since_jump = 0

    @property
    def seen(self) -> int:
        """Steps inside the averages."""
        return self.loss[BASELINE].seen

    @property
    def baseline(self) -> float:
        """Average of earlier losses over about `BASELINE` steps."""
        return self.loss[BASELINE].value

    @property
    def noise(self) -> float:
        """Standard deviation of single losses around the baseline, never zero."""
        return max(self._noise.value, 1e-4 * abs(self.baseline), TINY)

    @property
    def grad_baseline(self) -> float:
        """Geometric average of earlier gradient norms."""
        return math.exp(self.log_grad[BASELINE].value)

    @property
    def grad_noise(self) -> float:
        """Standard deviation of the logarithm of gradient norms."""
        return self._grad_noise.value

    def slope(self, scale: int) -> float:
        """Least-squares slope of the last `scale` losses, one of `SCALES`, per step; 0 with fewer than three."""
        return self.recent.trend().slope_S[SCALES.index(scale)]

    @property
    def oscillation(self) -> float:
        """Share of sign changes among the last 32 losses around their own line, 0 to 1."""
        return self.recent.trend().sign_changes

    def moment(
        self,
        facts: MadeStep,
        features_F: list[float],
        action_A: list[float],
        carry_G: list[float] | None = None,
        diverged: bool = False,
    ) -> Moment:
        """A step as the world model learns it. Call it before `update(facts)`: averages must not know the step yet."""
        known = bool(self.seen)
        return Moment(
            step=facts.step,
            features_F=features_F,
            action_A=action_A,
            loss=facts.loss,
            baseline=self.baseline if known else facts.loss,
            noise=self.noise,
            grad_norm=facts.grad_norm,
            grad_baseline=self.grad_baseline if known else facts.grad_norm,
            carry_G=carry_G,
            diverged=diverged,
        )

    def divergence(self, facts: MadeStep, predicted: float | None = None) -> str | None:
        """Why a step counts as divergence, or None. Call it before `update(facts)`.

        `predicted`: the loss that was foreseen. It fails if it is off by more than 20% and by more than `sigma` times
        the noise, so that a small and noisy loss does not. In settle steps after a jump the loss misleads, so only NaN,
        infinity and gradient norms count.
        """
        if not (math.isfinite(facts.loss) and math.isfinite(facts.grad_norm)):
            return f"loss {facts.loss}, gradient norm {facts.grad_norm}"
        if self.seen < TRUSTED:
            return None
        low, high = GRADIENT_RANGE
        ratio = facts.grad_norm / self.grad_baseline
        if not low <= ratio <= high:
            return f"gradient norm {facts.grad_norm:.3g} is {ratio:.3g} times its average"
        return None if facts.settling else self._misled(facts.loss, predicted)

    def _misled(self, loss: float, predicted: float | None) -> str | None:
        above = (loss - self.baseline) / self.noise
        if above > self.sigma:
            return f"loss {loss:.4g} is {above:.1f} standard deviations above its average"
        if predicted is not None:
            error = abs(loss - predicted)
            if error > PREDICTION_ERROR * abs(predicted) and error > self.sigma * self.noise:
                return f"loss {loss:.4g} where {predicted:.4g} was predicted"
        changes, amplitude = OSCILLATION
        trend = self.recent.trend_with(loss)
        often = len(trend.residual_N) == OSCILLATING and trend.sign_changes > changes
        if often and trend.residual_N.std() > amplitude * abs(self.baseline):
            return f"loss oscillates: {trend.sign_changes:.0%} sign changes around its trend"
        return None

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        averages = {name: [a.seen, a.value] for name, a in self._averages().items()}
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {"averages": averages, "recent": list(self.recent.values), **plain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name, average in self._averages().items():
            average.seen, average.value = state["averages"][name]
        self.recent.fill(state["recent"])
        for name in _PLAIN:
            setattr(self, name, state[name])

    def _averages(self) -> dict[str, Average]:
        scaled = {f"loss_{s}": a for s, a in self.loss.items()} | {f"log_grad_{s}": a for s, a in self.log_grad.items()}
        spreads = {"noise": self._noise, "grad_noise": self._grad_noise}
        means = {f"{name}_mean": spread.mean for name, spread in spreads.items()}
        return scaled | means | {f"{name}_square": spread.square for name, spread in spreads.items()}


_PLAIN = ("last_loss", "last_log_grad", "last_lr", "steps", "since_jump")
