"""The rollout in torch against torch.nn.GRUCell and loops in float64; what the op refuses."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from scale_kernels.rssm import RssmWeights, rollout
from scale_kernels.rssm.cpu import rollout_cpu
from scale_kernels.rssm.reference import rollout_reference, teacher_forced
from torch import nn
from torch.nn.functional import linear, softplus

from benchmarks.rssm_work import Case, converted, differences, make
from tests.kernels.rssm_cases import CASES, poisoned_memory

CASE = CASES[0]


def by_hand(given, latents_TEPZ=None):
    """One member, one path, one step at a time, with torch's own cell. Also the latents."""
    weights, h0, z0, actions, eps = given
    T, E, P, Z = eps.shape
    outputs, h_end, z_end = eps.new_empty(T, E, P, weights.outputs), torch.empty_like(h0), torch.empty_like(z0)
    latents = torch.empty_like(eps)
    for e in range(E):
        cell = nn.GRUCell(Z + weights.actions, weights.hidden, dtype=torch.float64)
        for name in ("ih", "hh"):
            getattr(cell, f"weight_{name}").data = getattr(weights, f"w_{name}")[e]
            getattr(cell, f"bias_{name}").data = getattr(weights, f"b_{name}")[e]
        for p in range(P):
            h, z = h0[e, p], z0[e, p]
            for t in range(T):
                h = cell(torch.cat((z, actions[t] if actions.ndim == 2 else actions[t, e, p])), h)
                prior = linear(h, weights.prior_weight[e], weights.prior_bias[e])
                sampled = prior[:Z] + (softplus(prior[Z:]) + weights.min_std) * eps[t, e, p]
                z = sampled if latents_TEPZ is None else latents_TEPZ[t, e, p]
                latents[t, e, p] = z
                outputs[t, e, p] = linear(torch.cat((h, z)), weights.head_weight[e], weights.head_bias[e])
            h_end[e, p], z_end[e, p] = h, z
    return (outputs, h_end, z_end), latents


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_reference_and_cpu_path_do_what_grucell_does(case):
    given = make(case)
    right, latents = by_hand(given)
    assert max(differences(rollout_reference(*given), right)) < 1e-13
    with poisoned_memory():
        found = rollout_cpu(*given)
    assert max(differences(found, right)) < 1e-13
    forced = teacher_forced(*given[:4], latents)
    assert max(differences(forced, right[:2])) < 1e-13


@torch.no_grad()
def test_teacher_forced_takes_the_latents_that_are_given():
    given = make(CASE)
    posterior = torch.randn_like(given[4])
    right, _ = by_hand(given, posterior)
    assert max(differences(teacher_forced(*given[:4], posterior), right[:2])) < 1e-13


@pytest.mark.parametrize("case", [Case(32, 32, 7, 1, 75), Case(128, 5, 1, 40, 2), *CASES[1:4]], ids=str)
def test_op_on_a_cpu(case):
    given = make(case)
    single = converted(given, torch.float32)
    found = rollout(*single)
    assert max(differences(found, rollout_reference(*given))) < 2e-5
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in found)
    assert max(differences(single[1:3], given[1:3])) < 1e-6, "initial states are left alone"


def test_bf16_weights_round_what_they_multiply():
    given = make(CASE, dtype=torch.float32)
    half = (given[0].to(torch.bfloat16), *given[1:])
    rounded = (half[0].to(torch.float32), *given[1:])
    errors = differences(rollout_reference(*half), rollout_reference(*rounded))
    assert 1e-5 < max(errors) < 3e-2 and rollout_reference(*half)[0].dtype == torch.float32


def test_reference_has_gradients_and_the_op_refuses_to_lose_them():
    given = make(CASE, dtype=torch.float32)
    given[0].w_hh.requires_grad_()
    rollout_reference(*given)[0].sum().backward()
    assert given[0].w_hh.grad is not None and given[0].w_hh.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no backward pass"):
        rollout(*given)
    with torch.no_grad():
        rollout(*given)


WRONG = {
    "w_ih has shape (2, 71, 12)": lambda w, *x: (replace(w, w_ih=w.w_ih[:, 1:]), *x),
    "w_hh has shape (2, 71, 24)": lambda w, *x: (replace(w, w_hh=w.w_hh[:, 1:]), *x),
    "b_ih has shape (2, 71)": lambda w, *x: (replace(w, b_ih=w.b_ih[:, 1:]), *x),
    "head_weight has shape (2, 15, 28)": lambda w, *x: (replace(w, head_weight=w.head_weight[..., 1:]), *x),
    "h0 has shape (1, 3, 24)": lambda w, h, *x: (w, h[:1], *x),
    "z0 has shape (2, 3, 4)": lambda w, h, z, *x: (w, h, z[..., 1:], *x),
    "actions has shape (1, 7)": lambda w, h, z, a, e: (w, h, z, a[1:], e),
    "eps has shape (2, 2, 2, 5)": lambda w, h, z, a, e: (w, h, z, a, e[:, :, 1:]),
    "z0 is torch.float64": lambda w, h, z, *x: (w, h, z.double(), *x),
    "0 steps of 3 paths": lambda w, h, z, a, e: (w, h, z, a[:0], e[:0]),
    "on cpu states are float32 and weights float32": lambda w, *x: (w.to(torch.bfloat16), *x),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rollout(*WRONG[message](*make(CASE, dtype=torch.float32)))


def test_weights_know_their_sizes():
    weights = make(CASE)[0]
    assert isinstance(weights, RssmWeights)
    sizes = (weights.members, weights.hidden, weights.latent, weights.actions, weights.outputs)
    assert sizes == (2, 24, 5, 7, 15) and weights.to(torch.float32).min_std == 0.07
