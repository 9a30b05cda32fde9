"""The world model as the rest of the program knows it: it observes moments and forecasts what comes next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from scale.config.predict import WorldConfig
from scale.predict.features import NAMES
from scale.predict.moments import Moment, StepForecast
from scale.predict.signals import RATE, TINY
from scale.predict.world.calibration import Calibration, confidence
from scale.predict.world.imagine import Anchor, Futures, imagine
from scale.predict.world.replay import Replay
from scale.predict.world.rssm import RssmEnsemble
from scale.predict.world.training import WorldTraining

READY = 10
"""Updates before the first forecast."""


class WorldModel:
    """Learns from every full step; forecasts once it was updated `READY` times. On rank 0, with random numbers of its own.

    On a CUDA `device` sampled futures are one Triton launch (`scale_kernels.rssm`). Random numbers are drawn on the CPU on
    either device.
    """

    def __init__(self, config: WorldConfig, seed: int, device: torch.device | str = "cpu"):
        self.config, self.seed = config, seed
        generator = torch.Generator().manual_seed(seed)
        self.model = RssmEnsemble(config.members, config.hidden, config.latent, len(NAMES), generator).to(device)
        self.replay = Replay(config.replay)
        self.training = WorldTraining(self.model, generator, config.bptt)
        self.calibration = Calibration()
        self.anchor: Anchor | None = None

    def observe(self, moment: Moment) -> None:
        """A full step that was made. Scores forecasts that were due, and every `train_every` moments learns."""
        self.replay.add(moment)
        self.anchor = _anchor(moment)
        self.calibration.observe(self.replay.added, self.anchor.loss, jumped=moment.action_A[2] != 0)
        if self.replay.added % self.config.train_every == 0:
            self.training.update(self.replay)

    def forecast(self, lr_factors: Sequence[float], distance: float = 0.0, jumped: int = 0) -> StepForecast | None:
        """What the next full steps bring, one for each learning rate (share of the peak); None while it knows too little.

        `distance`, `jumped`: of a jump right before the first of them, as moments tell it (per step, and its steps). Asking
        changes nothing but the list of forecasts to be scored: random numbers depend on seed and moment alone, so
        alternatives at one moment share theirs.
        """
        if self.anchor is None or self.training.updates < READY or not lr_factors:
            return None
        actions_TA = torch.tensor([[factor, 0.0, 0.0] for factor in lr_factors])
        actions_TA[0, 1:] = torch.tensor([distance, jumped / 100])
        generator = torch.Generator().manual_seed((self.seed << 32) + self.replay.added)
        past_LW = self.replay.newest(self.config.bptt)
        futures = imagine(self.model, past_LW, actions_TA, self.anchor, self.config.paths, generator)
        return self._calibrated(futures, self.anchor, jump=jumped > 0)

    def _calibrated(self, futures: Futures, anchor: Anchor, jump: bool) -> StepForecast:
        widening = self.calibration.widening
        lower_T = futures.loss_T - widening * (futures.loss_T - futures.lower_T)
        upper_T = futures.loss_T + widening * (futures.upper_T - futures.loss_T)
        narrow = [x.tolist() for x in (futures.loss_T, futures.lower_T, futures.upper_T)]
        self.calibration.register(self.replay.added, jump, anchor.loss, *narrow)
        return StepForecast(
            loss_T=futures.loss_T.tolist(),
            lower_T=lower_T.tolist(),
            upper_T=upper_T.tolist(),
            grad_norm_T=futures.grad_norm_T.tolist(),
            carry_TG=futures.carry_TG.tolist(),
            divergence=futures.divergence,
            confidence=confidence(float(upper_T[-1] - lower_T[-1]), anchor.noise, futures.divergence),
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON of everything that was learned and forecast."""
        return {
            "replay": self.replay.state_dict(),
            "training": self.training.state_dict(),
            "calibration": self.calibration.state_dict(),
            "anchor": None if self.anchor is None else [self.anchor.loss, self.anchor.noise, self.anchor.log_grad],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on bit for bit. Raises ValueError or RuntimeError if the sizes in the config are others."""
        self.replay.load_state_dict(state["replay"])
        self.training.load_state_dict(state["training"])
        self.calibration.load_state_dict(state["calibration"])
        self.anchor = None if state["anchor"] is None else Anchor(*state["anchor"])


def _anchor(moment: Moment) -> Anchor:
    """The averages with the step in them; a step that is not finite leaves them."""
    loss = moment.baseline + (RATE * (moment.loss - moment.baseline) if math.isfinite(moment.loss) else 0.0)
    before = math.log(max(moment.grad_baseline, TINY))
    known = math.isfinite(moment.grad_norm) and moment.grad_norm > 0
    return Anchor(loss, moment.noise, before + (RATE * (math.log(moment.grad_norm) - before) if known else 0.0))
