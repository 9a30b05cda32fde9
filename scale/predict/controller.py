"""Features, world model and the choice between jumps. On rank 0 alone; its decisions are broadcast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scale.config.predict import PredictConfig
from scale.predict.bandit import STAY, Bandit
from scale.predict.features import NAMES, FeatureEncoder
from scale.predict.kinds import KINDS
from scale.predict.moments import MadeStep, Statistics, StepForecast
from scale.predict.residuals import CarryCorrection, Residuals
from scale.predict.signals import Signals
from scale.predict.weights.jump import Place
from scale.predict.world import WorldModel

MOST_CARRY = 1.5
"""No kind of weights is moved further than this many straight lines."""
CONTEXT = 9
"""Numbers in a context of the bandit."""


@dataclass(frozen=True)
class Decision:
    """A jump to try, as JSON can carry it: `reach_KG` are coefficients (steps x lr factor) up to the K-th predicted step."""

    direction: str
    asked: int
    """The horizon that was chosen; `horizon` is what is left of it before the end of the run."""
    horizon: int
    reach_KG: list[list[float]]
    confidence: float | None
    loss_K: list[float] | None
    """What full steps would bring, as the world model forecasts it."""
    context: list[float]
    factor_P: list[float]
    """Learned from earlier jumps: by what the coefficients of each place are multiplied."""
    gain: float | None
    """Fall of the loss that the world model forecasts, by the jump and the settle steps after it."""
    expected: float | None
    """The same, corrected by what it missed in similar states."""
    features_F: list[float]

    def distance(self, steps: int) -> float:
        """Of its first `steps` steps: per step, in straight lines at lr factor 1, mean over kinds."""
        return _distance(self.reach_KG[steps - 1], steps)


def _distance(reach_G: Sequence[float], steps: int) -> float:
    return sum(reach_G) / len(reach_G) / steps


class Controller:
    """Observes every full step; decides when a jump may be tried."""

    def __init__(self, config: PredictConfig, device: torch.device | str = "cpu"):
        """`device` of the run, for `world.device = "training"`."""
        self.config = config
        self.signals = Signals(config.sigma)
        self.encoder = FeatureEncoder()
        self.world = WorldModel(config.world, config.seed, device if config.world.device == "training" else "cpu")
        self.bandit = Bandit(config.arms, CONTEXT)
        self.residuals = Residuals(len(NAMES))
        self.correction = CarryCorrection()
        self.last_F = [0.0] * len(NAMES)
        self.action = (0.0, 0)
        """Distance per step (see `Decision.distance`) and steps of a jump since the last full step."""
        self.calm = 0
        """Full steps since the last sign of divergence."""
        self.predicted: float | None = None
        """Loss that is forecast for the next full step."""

    def observe(self, step: MadeStep, statistics: Statistics | None, carry_G: list[float] | None) -> str | None:
        """A full step, `statistics` from before it and what was read of carry in it. Returns a sign of divergence."""
        self.last_F = self.encoder.features(self.signals, step, statistics)
        diverged = self.signals.divergence(step, self.predicted)
        distance, jumped = self.action
        action_A = [step.lr_factor, distance, jumped / 100]
        self.world.observe(self.signals.moment(step, self.last_F, action_A, carry_G, diverged is not None))
        self.signals.update(step)
        self.calm = 0 if diverged else self.calm + 1
        self.action, self.predicted = (0.0, 0), None
        return diverged

    def decide(
        self,
        step: int,
        steps: int,
        lr_factors: Sequence[float],
        ready: Sequence[str],
        statistics: Statistics | None,
        places: Sequence[Place],
    ) -> dict[str, Any]:
        """A jump to try, or why none: {"go": Decision as a dict} or {"stay": reason}; "soon" where nothing speaks against
        jumping a few steps later. `ready` are directions with vectors; `lr_factors` those of the coming steps."""
        if self.calm < self.config.min_full:
            return {"stay": "divergence", "soon": True}
        longest = min(max(horizon for horizon, _ in self.config.arms), len(lr_factors))
        forecast = self.world.forecast(lr_factors[:longest])
        if forecast is None and (self.config.coefficients == "world" or self.config.confidence > 0):
            return {"stay": "world model not trained yet", "soon": True}
        confidence = None if forecast is None else forecast.confidence
        if forecast is not None:
            self.predicted = forecast.loss_T[0]
        if confidence is not None and not confidence >= self.config.confidence:  # nan is no confidence either
            return {"stay": f"confidence {confidence:.2f}", "confidence": confidence}
        missed = self.residuals.correction(step, self.last_F)
        far = self._gain(longest, lr_factors, forecast)
        context = self._context(
            step / steps, lr_factors[0], forecast, statistics, None if far is None else far + missed
        )
        arms = [arm for arm in self.bandit.arms if arm[1] in ready]
        arm = self.bandit.choose(context, arms, stay=self.config.mode == "auto")
        if arm == STAY:
            return {"stay": "full steps pay more", "confidence": confidence}
        horizon, direction = arm
        reach = self._reach(min(horizon, longest), lr_factors, forecast)
        gain = far if len(reach) == longest else self._gain(len(reach), lr_factors, forecast)
        decision = Decision(
            direction,
            horizon,
            len(reach),
            reach,
            confidence,
            None if forecast is None else forecast.loss_T[: len(reach)],
            context,
            [self.correction.factor(*place) for place in places],
            gain,
            None if gain is None else gain + missed,
            self.last_F,
        )
        return {"go": vars(decision)}

    def _gain(self, horizon: int, lr_factors: Sequence[float], forecast: StepForecast | None) -> float | None:
        """Fall of the loss by a jump of `horizon` steps and the settle steps after it, in futures that begin with it."""
        if forecast is None or self.world.anchor is None:
            return None
        distance = _distance(self._reach(horizon, lr_factors, forecast)[-1], horizon)
        future = self.world.forecast(lr_factors[: self.config.guard.settle_steps], distance, horizon)
        return None if future is None else self.world.anchor.loss - future.loss_T[-1]

    def _reach(self, horizon: int, lr_factors: Sequence[float], forecast: StepForecast | None) -> list[list[float]]:
        """Coefficients of 1..horizon steps by kind: straight lines x sum of lr factors."""
        out, total = [], 0.0
        for k in range(horizon):
            total += lr_factors[k]
            out.append([share * total for share in self._share(k, forecast)])
        return out

    def _share(self, k: int, forecast: StepForecast | None) -> list[float]:
        if self.config.coefficients == "world":
            assert forecast is not None
            return [min(MOST_CARRY, max(0.0, share)) for share in forecast.carry_TG[k]]
        return [self.config.share] * len(KINDS)

    def _context(
        self,
        position: float,
        lr_factor: float,
        forecast: StepForecast | None,
        statistics: Statistics | None,
        expected: float | None,
    ) -> list[float]:
        """What the steps that a jump saves may depend on."""
        slope, noise = self.signals.slope(32), self.signals.noise
        carry = 1.0 if forecast is None else sum(forecast.carry_TG[-1]) / len(forecast.carry_TG[-1])
        confidence = 0.0 if forecast is None else forecast.confidence
        return [
            1.0,
            confidence,
            min(1.5, max(-0.5, carry)),
            min(1.0, max(-1.0, -slope / noise)),
            position,
            lr_factor,
            0.0 if statistics is None else statistics.update_cosine(),
            min(1.0, self.signals.oscillation),
            min(1.0, max(-1.0, (expected or 0.0) / noise)),
        ]

    def learn(self, decision: Decision, reward: float) -> None:
        """The reward of a jump, known after its acceptance test."""
        self.bandit.learn((decision.asked, decision.direction), decision.context, reward)

    def compare(self, step: int, decision: Decision, gain: float, stayed: Mapping[Place, float]) -> None:
        """What became of a jump: the real fall of the check loss, and how much of it was left at each place."""
        if decision.gain is not None and math.isfinite(gain):
            self.residuals.add(step, decision.features_F, decision.gain, gain)
        before = {place: factor for place, factor in zip(stayed, decision.factor_P, strict=True)}
        self.correction.learn({place: share * before[place] for place, share in stayed.items()})

    def jumped(self, steps: int, distance: float) -> None:
        """`steps` of a jump were kept, each this far (see `Decision.distance`): part of what leads to the next step."""
        self.signals.jumped()
        self.action, self.predicted = (distance, steps), None

    def undone(self) -> None:
        """A jump was undone, the steps after it with it."""
        self.world.replay.cut()

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name).state_dict() for name in _PARTS},
            "last_F": list(self.last_F),
            "action": list(self.action),
            "calm": self.calm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.last_F = list(state["last_F"])
        self.action, self.calm = (state["action"][0], state["action"][1]), state["calm"]


_PARTS = ("signals", "encoder", "world", "bandit", "residuals", "correction")
