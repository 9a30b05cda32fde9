"""The rollout in plain torch: differentiable, any float dtype, any device. Training uses it; the kernels answer to it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from scale_kernels.rssm.weights import RssmWeights, check


def rollout_reference(
    weights: RssmWeights, h0_EPH: Tensor, z0_EPZ: Tensor, actions: Tensor, eps_TEPZ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Imagine T steps, each fed with the latent that the one before sampled.

    `actions` (T, A) or (T, E, P, A); `eps_TEPZ` the standard normal noise of every step. Returns outputs_TEPO and the
    last h_EPH and z_EPZ. With bf16 weights what is multiplied by them is rounded to bf16 too, and sums are in the
    dtype of the state. Raises ValueError if shapes do not fit. PlaNet, arXiv 1811.04551, section 3.
    """
    check(weights, h0_EPH, z0_EPZ, actions, eps_TEPZ)
    h_EPH, z_EPZ, outputs = h0_EPH, z0_EPZ, []
    for action, eps_EPZ in zip(actions, eps_TEPZ, strict=True):
        h_EPH = gru(weights, h_EPH, z_EPZ, action)
        mean_EPZ, raw_EPZ = _product(h_EPH, weights.prior_weight, weights.prior_bias).chunk(2, -1)
        z_EPZ = mean_EPZ + (softplus(raw_EPZ) + weights.min_std) * eps_EPZ
        outputs.append(heads(weights, h_EPH, z_EPZ))
    return torch.stack(outputs), h_EPH, z_EPZ


def teacher_forced(
    weights: RssmWeights, h0_EPH: Tensor, z0_EPZ: Tensor, actions: Tensor, posterior_TEPZ: Tensor
) -> tuple[Tensor, Tensor]:
    """The same steps with the latents given: what a GRU over known inputs computes. Returns outputs_TEPO, h_EPH."""
    check(weights, h0_EPH, z0_EPZ, actions, posterior_TEPZ)
    h_EPH, z_EPZ, outputs = h0_EPH, z0_EPZ, []
    for action, given_EPZ in zip(actions, posterior_TEPZ, strict=True):
        h_EPH, z_EPZ = gru(weights, h_EPH, z_EPZ, action), given_EPZ
        outputs.append(heads(weights, h_EPH, z_EPZ))
    return torch.stack(outputs), h_EPH


def gru(weights: RssmWeights, h_EPH: Tensor, z_EPZ: Tensor, action: Tensor) -> Tensor:
    """torch.nn.GRUCell on [z, action] in every member; `action` (A,) or (E, P, A)."""
    x_EPI = torch.cat((z_EPZ, action.expand(*z_EPZ.shape[:2], -1)), -1)
    reset_in, update_in, new_in = _product(x_EPI, weights.w_ih, weights.b_ih).chunk(3, -1)
    reset_hidden, update_hidden, new_hidden = _product(h_EPH, weights.w_hh, weights.b_hh).chunk(3, -1)
    reset, update = torch.sigmoid(reset_in + reset_hidden), torch.sigmoid(update_in + update_hidden)
    new = torch.tanh(new_in + reset * new_hidden)
    return new + update * (h_EPH - new)


def heads(weights: RssmWeights, h_EPH: Tensor, z_EPZ: Tensor) -> Tensor:
    """Outputs (E, P, O) of one step."""
    return _product(torch.cat((h_EPH, z_EPZ), -1), weights.head_weight, weights.head_bias)


def _product(x_EPK: Tensor, weight_ENK: Tensor, bias_EN: Tensor) -> Tensor:
    dtype = x_EPK.dtype
    return x_EPK.to(weight_ENK.dtype).to(dtype) @ weight_ENK.to(dtype).mT + bias_EN.to(dtype)[:, None]
