"""The rollout on a CPU, where a step of small members costs what its calls into torch cost: eight of them.

The action part of all steps is one product before the loop, the heads of all steps are one after it. Within a step
all gates are one product over the state, whose new gate has two blocks of columns, because the reset gate scales only
its hidden part. Instead of h the loop keeps s = (h + 1) / 2: as tanh(x) = 2 sigmoid(2x) - 1, the GRU is then
s' = (1 - u) sigmoid(2x) + u s, and what s changes in products goes into weights and biases beforehand (`_halved`).
torch.tanh would hand even a few hundred numbers to several threads, which costs more than the rest of the step.
`min_std * eps` is added to the prior's bias. Every result is written into its place in buffers made once, so that no
step allocates, slices, copies or concatenates; methods that work in place cost less than functions with `out=`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scale_kernels.rssm.weights import RssmWeights

_softplus: Any = torch._C._nn.softplus  # torch.nn.functional.softplus without `out=` allocates


def rollout_cpu(
    weights: RssmWeights, h0_EPH: Tensor, z0_EPZ: Tensor, actions: Tensor, eps_TEPZ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `scale_kernels.rssm.rollout`. fp32 or fp64; nothing is checked here."""
    T, E, P, Z = eps_TEPZ.shape
    H = weights.hidden
    w_EXG, gates_TEPG = _gates(weights, actions, P)
    w_prior_EHQ, prior_bias_EQ = _halved(weights.prior_weight.mT, weights.prior_bias)
    prior_TEPQ = prior_bias_EQ[:, None].expand(T, E, P, 2 * Z).contiguous()
    prior_TEPQ[..., :Z] += weights.min_std * eps_TEPZ
    states_TEPX = h0_EPH.new_empty(T + 1, E, P, Z + H)
    states_TEPX[0, ..., :Z], states_TEPX[0, ..., Z:] = z0_EPZ, (h0_EPH + 1) / 2
    states, latents, halves = states_TEPX.unbind(), states_TEPX[..., :Z].unbind(), states_TEPX[..., Z:].unbind()
    gates_EPG, prior_EPQ, std = h0_EPH.new_empty(E, P, 4 * H), h0_EPH.new_empty(E, P, 2 * Z), torch.empty_like(z0_EPZ)
    both = gates_EPG[..., : 2 * H]
    reset, update, new, new_hidden = gates_EPG.chunk(4, -1)
    mean, raw = prior_EPQ.chunk(2, -1)
    given = zip(gates_TEPG.unbind(), prior_TEPQ.unbind(), eps_TEPZ.unbind(), strict=True)
    for t, (gate_bias, prior_bias, eps) in enumerate(given):
        torch.baddbmm(gate_bias, states[t], w_EXG, out=gates_EPG)
        both.sigmoid_()
        new.addcmul_(reset, new_hidden).sigmoid_()  # of twice the new gate's input
        torch.lerp(new, halves[t], update, out=halves[t + 1])
        torch.baddbmm(prior_bias, halves[t + 1], w_prior_EHQ, out=prior_EPQ)
        _softplus(raw, 1, 20, out=std)
        torch.addcmul(mean, std, eps, out=latents[t + 1])
    states_TEPX[..., Z:].mul_(2).sub_(1)
    return _heads(weights, states_TEPX[1:]), halves[T].clone(), latents[T].clone()


def _halved(w_EHN: Tensor, bias_EN: Tensor) -> tuple[Tensor, Tensor]:
    """Weights over s and biases that give what `w` and `bias` give over h = 2 s - 1."""
    return (2 * w_EHN).contiguous(), bias_EN - w_EHN.sum(1)


def _gates(weights: RssmWeights, actions: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """Weights (E, Z + H, 4H) over [z, s] and what actions and biases add in every step (T, E, P, 4H).

    Columns are reset, update, new from the input, new from the hidden state, the last two doubled.
    """
    E, H, Z, A, T = weights.members, weights.hidden, weights.latent, weights.actions, len(actions)
    w_EKG, bias_EG = weights.w_hh.new_zeros(E, Z + H + A, 4 * H), weights.w_hh.new_empty(E, 4 * H)
    w_hh_EHG, b_hh_EG = _halved(weights.w_hh.mT, weights.b_hh)
    w_EKG[:, :Z, : 3 * H], w_EKG[:, Z + H :, : 3 * H] = weights.w_ih.mT.split((Z, A), 1)
    bias_EG[:, : 3 * H] = weights.b_ih
    for ours, theirs in ((slice(2 * H), slice(2 * H)), (slice(3 * H, None), slice(2 * H, None))):
        w_EKG[:, Z : Z + H, ours] = w_hh_EHG[..., theirs]
    bias_EG[:, : 2 * H] += b_hh_EG[:, : 2 * H]
    bias_EG[:, 3 * H :] = b_hh_EG[:, 2 * H :]
    w_EKG[..., 2 * H :] *= 2
    bias_EG[:, 2 * H :] *= 2
    shared = actions.ndim == 2
    known_ENA = actions.expand(E, T, A) if shared else actions.transpose(0, 1).reshape(E, T * P, A)
    gates_ENG = torch.baddbmm(bias_EG[:, None], known_ENA, w_EKG[:, Z + H :])
    return w_EKG[:, : Z + H], gates_ENG.view(E, T, -1, 4 * H).transpose(0, 1).expand(T, E, P, 4 * H)


def _heads(weights: RssmWeights, states_TEPX: Tensor) -> Tensor:
    T, E, P, _ = states_TEPX.shape
    Z, H = weights.latent, weights.hidden
    w_EOX = torch.cat((weights.head_weight[..., H:], weights.head_weight[..., :H]), -1)
    states_ENX = states_TEPX.transpose(0, 1).reshape(E, T * P, Z + H)
    outputs_ENO = torch.baddbmm(weights.head_bias[:, None], states_ENX, w_EOX.mT)
    return outputs_ENO.view(E, T, P, -1).transpose(0, 1).contiguous()
