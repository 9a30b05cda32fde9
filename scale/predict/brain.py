"""What thinks: features, world model, choice between jumps. On rank 0 alone; the others are told what it decided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scale.config.predict import PredictConfig
from scale.predict.bandit import STAY, Bandit
from scale.predict.features import NAMES, Coming, FeatureEncoder
from scale.predict.groups import KINDS
from scale.predict.moments import Forecast, GroupStats, StepFacts
from scale.predict.residuals import CarryCorrection, Residuals
from scale.predict.signals import Signals
from scale.predict.weights.jump import Place
from scale.predict.world.foresight import Foresight

MOST_CARRY = 1.5
"""No kind of weights is moved further than this many straight lines."""


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
    """What full steps would bring, as the world model sees it."""
    context: list[float]
    factor_P: list[float]
    """Learned from earlier jumps: by what the coefficients of each place are multiplied."""
    gain: float | None
    """Fall of the loss that the world model foresees, by the jump and the relaxing steps after it."""
    expected: float | None
    """The same, corrected by what it missed in similar states."""
    features_F: list[float]

    def distance(self, steps: int) -> float:
        """Of its first `steps` steps: per step, in straight lines at lr factor 1, mean over kinds."""
        return _distance(self.reach_KG[steps - 1], steps)


def _distance(reach_G: Sequence[float], steps: int) -> float:
    return sum(reach_G) / len(reach_G) / steps


class Brain:
    """Hears of every full step, once before and once after it; is asked when a jump may be thought of."""

    def __init__(self, config: PredictConfig):
        self.config = config
        self.signals = Signals(config.sigma)
        self.encoder = FeatureEncoder()
        self.foresight = Foresight(config.world, config.seed)
        self.bandit = Bandit([(h, name) for name in config.directions for h in config.horizons], CONTEXT)
        self.residuals = Residuals(len(NAMES))
        self.correction = CarryCorrection()
        self.features_F: list[float] | None = None
        self.last_F = [0.0] * len(NAMES)
        self.action = (0.0, 0)
        """Distance per step (see `Decision.distance`) and steps of a jump since the last full step."""
        self.calm = 0
        """Full steps since the last sign of divergence."""
        self.foreseen: float | None = None

    def before(self, coming: Coming, stats: GroupStats | None) -> None:
        """A full step is about to be made."""
        self.features_F = self.last_F = self.encoder.features(self.signals, coming, stats)

    def after(self, facts: StepFacts, carry_G: list[float] | None) -> str | None:
        """It was made. Returns a sign of divergence."""
        assert self.features_F is not None, "before comes first"
        diverged = self.signals.divergence(facts, self.foreseen)
        distance, jumped = self.action
        action_A = [facts.lr_factor, distance, jumped / 100]
        moment = self.signals.moment(facts, self.features_F, action_A, carry_G, diverged is not None)
        self.foresight.observe(moment)
        self.signals.update(facts)
        self.calm = 0 if diverged else self.calm + 1
        self.action, self.features_F, self.foreseen = (0.0, 0), None, None
        return diverged

    def decide(
        self,
        step: int,
        steps: int,
        lr_factors: Sequence[float],
        ready: Sequence[str],
        stats: GroupStats | None,
        places: Sequence[Place],
    ) -> dict[str, Any]:
        """A jump to try, or why none: {"go": Decision as a dict} or {"stay": reason}; "soon" where nothing speaks against
        jumping a few steps later. `ready` are directions with vectors; `lr_factors` those of the coming steps."""
        if self.calm < self.config.min_full:
            return {"stay": "divergence", "soon": True}
        longest = min(max(self.config.horizons), len(lr_factors))
        forecast = self.foresight.forecast(lr_factors[:longest])
        if forecast is None and (self.config.coefficients == "world" or self.config.confidence > 0):
            return {"stay": "world model not trained yet", "soon": True}
        confidence = None if forecast is None else forecast.confidence
        if forecast is not None:
            self.foreseen = forecast.loss_T[0]
        if confidence is not None and not confidence >= self.config.confidence:  # nan is no confidence either
            return {"stay": f"confidence {confidence:.2f}", "confidence": confidence}
        missed = self.residuals.correction(step, self.last_F)
        far = self._imagined(longest, lr_factors, forecast)
        context = self._context(step / steps, lr_factors[0], forecast, stats, None if far is None else far + missed)
        arms = [arm for arm in self.bandit.arms if arm[1] in ready]
        arm = self.bandit.choose(context, arms, stay=self.config.mode == "auto")
        if arm == STAY:
            return {"stay": "full steps pay more", "confidence": confidence}
        horizon, direction = int(arm[0]), arm[1]
        reach = self._reach(min(horizon, longest), lr_factors, forecast)
        gain = far if len(reach) == longest else self._imagined(len(reach), lr_factors, forecast)
        expected = None if gain is None else gain + missed
        losses = None if forecast is None else forecast.loss_T[: len(reach)]
        factors = [self.correction.factor(*place) for place in places]
        decision = Decision(
            direction, horizon, len(reach), reach, confidence, losses, context, factors, gain, expected, self.last_F
        )
        return {"go": vars(decision)}

    def _imagined(self, horizon: int, lr_factors: Sequence[float], forecast: Forecast | None) -> float | None:
        """Fall of the loss by a jump of `horizon` steps and the relaxing steps after it, in futures that begin with it."""
        if forecast is None or self.foresight.anchor is None:
            return None
        distance = _distance(self._reach(horizon, lr_factors, forecast)[-1], horizon)
        future = self.foresight.forecast(lr_factors[: self.config.guard.relax], distance, horizon)
        return None if future is None else self.foresight.anchor.loss - future.loss_T[-1]

    def _reach(self, horizon: int, lr_factors: Sequence[float], forecast: Forecast | None) -> list[list[float]]:
        """Coefficients of 1..horizon steps by kind: straight lines x sum of lr factors."""
        out, total = [], 0.0
        for k in range(horizon):
            total += lr_factors[k]
            out.append([share * total for share in self._share(k, forecast)])
        return out

    def _share(self, k: int, forecast: Forecast | None) -> list[float]:
        if self.config.coefficients == "world":
            assert forecast is not None
            return [min(MOST_CARRY, max(0.0, share)) for share in forecast.carry_TG[k]]
        share = self.config.fixed if self.config.fixed is not None else 1.0
        return [share] * len(KINDS)

    def _context(
        self,
        position: float,
        lr_factor: float,
        forecast: Forecast | None,
        stats: GroupStats | None,
        expected: float | None,
    ) -> list[float]:
        """What the worth of a jump may depend on."""
        slope, noise = self.signals.slope(32), self.signals.noise
        cosine = agreement(stats)
        carry = 1.0 if forecast is None else sum(forecast.carry_TG[-1]) / len(forecast.carry_TG[-1])
        confidence = 0.0 if forecast is None else forecast.confidence
        return [
            1.0,
            confidence,
            min(1.5, max(-0.5, carry)),
            min(1.0, max(-1.0, -slope / noise)),
            position,
            lr_factor,
            cosine,
            min(1.0, self.signals.oscillation),
            min(1.0, max(-1.0, (expected or 0.0) / noise)),
        ]

    def share_context(self, position: float) -> list[float]:
        """What the worth of leaving documents out may depend on; `position` is the part of the run that is done."""
        return [1.0, min(1.0, max(-1.0, -self.signals.slope(32) / self.signals.noise)), position]

    def learn(self, decision: Decision, reward: float) -> None:
        """What a jump turned out to be worth."""
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
        self.action, self.foreseen = (distance, steps), None

    def undone(self) -> None:
        """A jump was undone, the steps after it with it."""
        self.foresight.replay.cut()

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name).state_dict() for name in PARTS},
            "last_F": list(self.last_F),
            "action": list(self.action),
            "calm": self.calm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.last_F = list(state["last_F"])
        self.action, self.calm = (state["action"][0], state["action"][1]), state["calm"]


PARTS = ("signals", "encoder", "foresight", "bandit", "residuals", "correction")
CONTEXT = 9
"""Numbers in a context."""
_DD, _DU, _UU = 7, 8, 9


def agreement(stats: GroupStats | None) -> float:
    """Cosine of the last update with the smoothed earlier ones, over all weights; 0 if unknown."""
    if stats is None:
        return 0.0
    total_C = stats.table_GC.sum(0)
    norms = float(total_C[_DD] * total_C[_UU]) ** 0.5
    return float(total_C[_DU]) / norms if norms > 0 else 0.0
