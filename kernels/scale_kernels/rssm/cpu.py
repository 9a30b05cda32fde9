"""The rollout on a CPU, where a step of small members costs what its calls into torch cost: ten of them.

The action part of all steps is one product before the loop, the heads of all steps are one after it. Within a step
all gates are one product over the state [z, h]: the new gate has two blocks of columns, because the reset gate scales
only its hidden part. Those columns are doubled, and the new gate is tanh(x) = 2 sigmoid(2x) - 1: torch.tanh hands
even a few hundred numbers to several threads, which costs more than the rest of the step. `min_std * eps` is added to
the prior's bias beforehand. Every result is written into its place in buffers made once, so that no step allocates,
slices or concatenates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scale_kernels.rssm.weights import RssmWeights, action_gates

_softplus: Any = torch._C._nn.softplus  # torch.nn.functional.softplus without `out=` allocates


def rollout_cpu(
    weights: RssmWeights, h0_EPH: Tensor, z0_EPZ: Tensor, actions: Tensor, eps_TEPZ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `scale_kernels.rssm.rollout`. fp32 or fp64; nothing is checked here."""
    T, E, P, Z = eps_TEPZ.shape
    H = weights.hidden
    w_EXG, gates_TEPG = _gate_product(weights), _gate_bias(weights, actions, P)
    w_prior_EHQ = weights.prior_weight.mT.contiguous()
    prior_TEPQ = weights.prior_bias[:, None].expand(T, E, P, 2 * Z).contiguous()
    prior_TEPQ[..., :Z] += weights.min_std * eps_TEPZ
    states_TEPX = h0_EPH.new_empty(T + 1, E, P, Z + H)
    states_TEPX[0, ..., :Z], states_TEPX[0, ..., Z:] = z0_EPZ, h0_EPH
    states, latents, hiddens = states_TEPX.unbind(), states_TEPX[..., :Z].unbind(), states_TEPX[..., Z:].unbind()
    gates_EPG, prior_EPQ = h0_EPH.new_empty(E, P, 4 * H), h0_EPH.new_empty(E, P, 2 * Z)
    both = gates_EPG[..., : 2 * H]
    reset, update, new, new_hidden = gates_EPG.chunk(4, -1)
    mean, raw = prior_EPQ.chunk(2, -1)
    minus_one = h0_EPH.new_full((), -1.0)
    std, h_EPH = torch.empty_like(z0_EPZ), torch.empty_like(h0_EPH)
    given = zip(gates_TEPG.unbind(), prior_TEPQ.unbind(), eps_TEPZ.unbind(), strict=True)
    for t, (gate_bias, prior_bias, eps) in enumerate(given):
        torch.baddbmm(gate_bias, states[t], w_EXG, out=gates_EPG)
        torch.sigmoid(both, out=both)
        torch.addcmul(new, reset, new_hidden, out=new)  # twice the new gate's input
        torch.sigmoid(new, out=new)
        torch.add(minus_one, new, alpha=2, out=new)
        torch.lerp(new, hiddens[t], update, out=h_EPH)
        hiddens[t + 1].copy_(h_EPH)
        torch.baddbmm(prior_bias, h_EPH, w_prior_EHQ, out=prior_EPQ)
        _softplus(raw, 1, 20, out=std)
        torch.addcmul(mean, std, eps, out=latents[t + 1])
    return _heads(weights, states_TEPX[1:]), hiddens[T].clone(), latents[T].clone()


def _gate_product(weights: RssmWeights) -> Tensor:
    """Columns reset, update, new from the input, new from the hidden state, the last two doubled. (E, Z + H, 4H)."""
    Z, H = weights.latent, weights.hidden
    w_EXG = weights.w_hh.new_zeros(weights.members, Z + H, 4 * H)
    w_EXG[:, :Z, : 3 * H] = weights.w_ih[:, :, :Z].mT
    w_EXG[:, Z:, : 2 * H] = weights.w_hh[:, : 2 * H].mT
    w_EXG[:, Z:, 3 * H :] = weights.w_hh[:, 2 * H :].mT
    w_EXG[..., 2 * H :] *= 2
    return w_EXG


def _gate_bias(weights: RssmWeights, actions: Tensor, P: int) -> Tensor:
    """The same columns for every step: actions and biases, (T, E, P, 4H)."""
    H = weights.hidden
    known = action_gates(weights, actions)
    gates_TEPG = known.new_empty(known.shape[0], weights.members, P, 4 * H)
    gates_TEPG[..., : 3 * H] = known
    gates_TEPG[..., 3 * H :] = weights.b_hh[:, None, 2 * H :]
    gates_TEPG[..., 2 * H :] *= 2
    return gates_TEPG


def _heads(weights: RssmWeights, states_TEPX: Tensor) -> Tensor:
    T, E, P, _ = states_TEPX.shape
    Z, H = weights.latent, weights.hidden
    w_EOX = torch.cat((weights.head_weight[..., H:], weights.head_weight[..., :H]), -1)
    states_ENX = states_TEPX.transpose(0, 1).reshape(E, T * P, Z + H)
    outputs_ENO = torch.baddbmm(weights.head_bias[:, None], states_ENX, w_EOX.mT)
    return outputs_ENO.view(E, T, P, -1).transpose(0, 1).contiguous()
