"""An ensemble of recurrent state-space models, all members in one batched product.

Letters: E members, B sequences, L moments, H hidden, Z latent, F features, A actions, O outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from scale_kernels.rssm import RssmWeights
from scale_kernels.rssm.reference import gru, heads
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

CARRIES = 10
"""Kinds of weights with a carry of their own; the eleventh, the rest, takes their mean."""
ACTIONS = 3
OUTPUTS = 4 + CARRIES + 1
MIN_STD = 0.1
"""Of latents and of the loss, whose unit is its noise."""
MIN_GRAD_STD = 0.02
RARE = -5.0
"""Logit of divergence before anything was learned."""


@dataclass(frozen=True)
class State:
    """Where every member of every sequence stands."""

    h_EBH: Tensor
    z_EBZ: Tensor


@dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions."""

    mean: Tensor
    std: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        return self.mean + self.std * eps


@dataclass(frozen=True)
class Outputs:
    """What the heads say of a step. The leading dimensions are those of the raw outputs."""

    loss: Gaussian
    """(loss - baseline) / noise."""
    grad: Gaussian
    """log(gradient norm / its baseline)."""
    carry: Tensor
    """(..., CARRIES), in straight lines."""
    divergence: Tensor
    """Logit."""


def split(outputs: Tensor) -> Outputs:
    """Raw head outputs (..., O) with their meaning."""
    mean, raw, grad_mean, grad_raw = outputs[..., :4].unbind(-1)
    return Outputs(
        Gaussian(mean, softplus(raw) + MIN_STD),
        Gaussian(grad_mean, softplus(grad_raw) + MIN_GRAD_STD),
        outputs[..., 4 : 4 + CARRIES],
        outputs[..., -1],
    )


class RssmEnsemble(nn.Module):
    """PlaNet's state-space model (arXiv 1811.04551) with Gaussian latents and a linear prior.

    One moment: h = GRU(h, [z, action]); z from the prior given h, or from the posterior given h and the features
    known before the step; the heads say from [h, z] what the step brings. Weights come from `generator` alone.
    A run has few updates to give: with quiet heads and noisy latents the first hundred are lost on waking them up.
    """

    def __init__(self, members: int, hidden: int, latent: int, features: int, generator: torch.Generator):
        super().__init__()
        E, H, Z, F = members, hidden, latent, features
        self.hidden, self.latent = H, Z

        def make(rows: int, columns: int, gain: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(E, rows, columns, generator=generator) * (gain / math.sqrt(columns)))

        self.w_ih = make(3 * H, Z + ACTIONS, 2.0)
        self.w_hh = make(3 * H, H)
        self.b_ih = nn.Parameter(torch.zeros(E, 3 * H))
        self.b_hh = nn.Parameter(torch.zeros(E, 3 * H))
        self.prior_weight = make(2 * Z, H, 0.3)
        self.prior_bias = nn.Parameter(_narrow(Z).repeat(E, 1))
        self.head_weight = make(OUTPUTS, H + Z, 0.5)
        self.head_bias = nn.Parameter(_unlearned().repeat(E, 1))
        self.embed_features = make(H, F)
        self.embed_hidden = make(H, H)
        self.embed_bias = nn.Parameter(torch.zeros(E, H))
        self.posterior_weight = make(2 * Z, H)
        self.posterior_bias = nn.Parameter(_narrow(Z).repeat(E, 1))

    def weights(self) -> RssmWeights:
        """The part that imagines, as `scale_kernels.rssm.rollout` takes it. Shares memory with the parameters."""
        names = [field.name for field in fields(RssmWeights) if field.name != "min_std"]
        return RssmWeights(**{name: getattr(self, name) for name in names}, min_std=MIN_STD)

    def start(self, sequences: int) -> State:
        """Nothing is known: zeros."""
        E = self.w_hh.shape[0]
        return State(self.w_hh.new_zeros(E, sequences, self.hidden), self.w_hh.new_zeros(E, sequences, self.latent))

    def embed(self, features_EBLF: Tensor) -> Tensor:
        """The features' part of every posterior, in one product: (L, E, B, H)."""
        E, B, L, F = features_EBLF.shape
        x_ENH = torch.baddbmm(self.embed_bias[:, None], features_EBLF.reshape(E, B * L, F), self.embed_features.mT)
        return x_ENH.view(E, B, L, self.hidden).permute(2, 0, 1, 3)

    def advance(self, weights: RssmWeights, state: State, action_EBA: Tensor) -> Tensor:
        """The next h_EBH."""
        return gru(weights, state.h_EBH, state.z_EBZ, action_EBA)

    def prior(self, h_EBH: Tensor) -> Gaussian:
        """Of z, without the features."""
        return _latent(torch.baddbmm(self.prior_bias[:, None], h_EBH, self.prior_weight.mT))

    def posterior(self, h_EBH: Tensor, embedded_EBH: Tensor) -> Gaussian:
        """Of z, with the features as `embed` gives them."""
        x_EBH = silu(torch.baddbmm(embedded_EBH, h_EBH, self.embed_hidden.mT))
        return _latent(torch.baddbmm(self.posterior_bias[:, None], x_EBH, self.posterior_weight.mT))

    def heads(self, weights: RssmWeights, h_EBH: Tensor, z_EBZ: Tensor) -> Tensor:
        """Raw outputs (E, B, O)."""
        return heads(weights, h_EBH, z_EBZ)


def _latent(raw_EBQ: Tensor) -> Gaussian:
    mean_EBZ, raw_EBZ = raw_EBQ.chunk(2, -1)
    return Gaussian(mean_EBZ, softplus(raw_EBZ) + MIN_STD)


def _narrow(latent: int) -> Tensor:
    """Biases of latents that carry more than their noise from the start: standard deviation .41."""
    return torch.tensor([0.0] * latent + [-1.0] * latent)


def _unlearned() -> Tensor:
    """Head biases that say: the loss stays where it is, noise as measured, drift carries half, no divergence."""
    bias_O = torch.zeros(OUTPUTS)
    bias_O[1] = math.log(math.expm1(1 - MIN_STD))
    bias_O[3] = math.log(math.expm1(0.2))
    bias_O[4 : 4 + CARRIES] = 0.5
    bias_O[-1] = RARE
    return bias_O
