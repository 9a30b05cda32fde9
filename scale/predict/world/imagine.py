"""Sampled futures of training, and what they say together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scale_kernels.rssm import rollout
from torch import Tensor

from scale.predict.signals import RATE
from scale.predict.world.replay import Batch
from scale.predict.world.rssm import Gaussian, Outputs, RssmEnsemble, State, split
from scale.predict.world.training import filtered

INTERVAL = 0.9
"""Share of futures between the bounds."""


@dataclass(frozen=True)
class Anchor:
    """Where futures start: averages that contain the last full step."""

    loss: float
    noise: float
    log_grad: float


@dataclass(frozen=True)
class Futures:
    """All members and paths together, before calibration: smoothed losses, gradient norms, carry by kind."""

    loss_T: Tensor
    lower_T: Tensor
    upper_T: Tensor
    grad_norm_T: Tensor
    carry_TG: Tensor
    divergence: float


def imagine(
    model: RssmEnsemble, past_LW: Tensor, actions_TA: Tensor, anchor: Anchor, paths: int, generator: torch.Generator
) -> Futures:
    """P futures of every member, from its own view of the last L moments (rows of the replay)."""
    with torch.no_grad():
        weights = model.weights()
        E, T, P, Z = weights.members, len(actions_TA), paths, model.latent
        device = model.w_hh.device
        past = Batch.of(past_LW.to(device).expand(E, 1, *past_LW.shape))
        states, posteriors = filtered(model, weights, past, None)
        now = _spread(states[-1], posteriors[-1], torch.randn(E, P, Z, generator=generator).to(device))
        eps_TEPZ = torch.randn(T, E, P, Z, generator=generator).to(device)
        outputs, _, _ = rollout(weights, now.h_EBH, now.z_EBZ, actions_TA.to(device), eps_TEPZ)
        return _summary(split(outputs.cpu()), anchor, torch.randn(T, E, P, generator=generator))


def smoothed(predicted: Gaussian, anchor: Anchor, eps_TEP: Tensor) -> tuple[Tensor, Tensor]:
    """Baseline of the loss after each imagined step, without and with the noise of single losses in it (T, E, P).

    The baseline moves by RATE x noise x y, y being the loss above its baseline in units of noise. Sampled noise must
    not move the baseline that later y refer to: no head would see it there and pull back, and it would walk off at
    random. So it is smoothed beside the mean: n' = (1 - RATE) n + RATE x noise x std x eps.
    """
    mean_TEP = anchor.loss + RATE * anchor.noise * predicted.mean.cumsum(0)
    ages_TT = torch.arange(len(eps_TEP))[:, None] - torch.arange(len(eps_TEP))
    kept_TT = torch.where(ages_TT >= 0, (1 - RATE) ** ages_TT.clamp(min=0), 0.0)
    noise_TEP = torch.einsum("ts,sep->tep", kept_TT, RATE * anchor.noise * predicted.std * eps_TEP)
    return mean_TEP, mean_TEP + noise_TEP


def _spread(state: State, posterior: Gaussian, eps_EPZ: Tensor) -> State:
    h_EPH = state.h_EBH.expand(-1, eps_EPZ.shape[1], -1).contiguous()
    return State(h_EPH, posterior.sample(eps_EPZ))


def _summary(predicted: Outputs, anchor: Anchor, eps_TEP: Tensor) -> Futures:
    mean_TEP, sampled_TEP = smoothed(predicted.loss, anchor, eps_TEP)
    tail = (1 - INTERVAL) / 2
    lower_T, upper_T = torch.quantile(sampled_TEP.flatten(1), torch.tensor([tail, 1 - tail]), 1)
    log_grad_T = anchor.log_grad + RATE * predicted.grad.mean.mean((1, 2)).cumsum(0)
    carry_TG = predicted.carry.mean((1, 2))
    calm = torch.nn.functional.logsigmoid(-predicted.divergence).sum(0).exp().mean()
    return Futures(
        loss_T=mean_TEP.mean((1, 2)),
        lower_T=lower_T,
        upper_T=upper_T,
        grad_norm_T=log_grad_T.clamp(-math.log(1e30), math.log(1e30)).exp(),
        carry_TG=torch.cat([carry_TG, carry_TG.mean(1, keepdim=True)], 1),
        divergence=1 - float(calm),
    )
