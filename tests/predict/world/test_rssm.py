"""The ensemble and how it is taught."""

from __future__ import annotations

import math

import pytest
import torch
from scale_kernels.rssm import rollout
from scale_kernels.rssm.reference import rollout_reference
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from scale.predict.features import NAMES
from scale.predict.moments import Moment
from scale.predict.world.replay import WIDTH, Batch, Replay
from scale.predict.world.rssm import ACTIONS, CARRIES, OUTPUTS, Gaussian, RssmEnsemble, State, split
from scale.predict.world.training import WorldTraining, balanced_kl, filtered, gaussian_kl, open_loop, prediction_loss

E, H, Z, F = 3, 12, 4, len(NAMES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(seed: int = 0) -> RssmEnsemble:
    made = RssmEnsemble(E, H, Z, F, generator(seed))
    with torch.no_grad():  # not the quiet heads of a new model
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator(seed + 1))
    return made


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def batch(length: int = 8, windows: int = 2, seed: int = 7) -> Batch:
    rows = noise(E, windows, length, WIDTH, seed=seed)
    rows[..., F + ACTIONS + 2] = (rows[..., F + ACTIONS + 2] > 1).float()
    return Batch.of(rows)


def test_imagination_is_the_rollout_of_the_kernels() -> None:
    world, given, eps = model(), batch(6), noise(5, E, 2, Z)
    start = State(noise(E, 2, H, seed=1), noise(E, 2, Z, seed=2))
    actions_TEPA = given.actions.permute(2, 0, 1, 3)[1:].contiguous()
    with torch.no_grad():
        ours = open_loop(world, world.weights(), [start], given.actions, eps)
        for run in (rollout, rollout_reference):
            theirs = run(world.weights(), start.h_EBH, start.z_EBZ, actions_TEPA, eps)[0]
            assert torch.allclose(ours, theirs, atol=2e-6), run
    assert ours.shape == (5, E, 2, OUTPUTS) and ours.std() > 0.1


def test_a_member_is_a_grucell_and_linear_layers() -> None:
    world, given = model(), batch(3)
    with torch.no_grad():
        states, posteriors = filtered(world, world.weights(), given, noise(3, E, 2, Z))
        for e in range(E):
            cell = torch.nn.GRUCell(Z + ACTIONS, H)
            for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
                getattr(cell, name.replace("w_", "weight_").replace("b_", "bias_")).copy_(getattr(world, name)[e])
            h, z = torch.zeros(2, H), torch.zeros(2, Z)
            for t in range(3):
                h = cell(torch.cat([z, given.actions[e, :, t]], -1), h)
                x = h @ world.embed_hidden[e].T + given.features[e, :, t] @ world.embed_features[e].T
                x = torch.nn.functional.silu(x + world.embed_bias[e])
                mean, raw = (x @ world.posterior_weight[e].T + world.posterior_bias[e]).chunk(2, -1)
                assert torch.allclose(posteriors[t].mean[e], mean, atol=1e-5)
                z = mean + (torch.nn.functional.softplus(raw) + 0.1) * noise(3, E, 2, Z)[t, e]
                assert torch.allclose(states[t].h_EBH[e], h, atol=1e-5) and torch.allclose(
                    states[t].z_EBZ[e], z, atol=1e-5
                )


def test_a_new_model_says_that_all_stays_as_it_is() -> None:
    world = RssmEnsemble(E, H, Z, F, generator())
    forecast = split(world.heads(world.weights(), torch.zeros(E, 1, H), torch.zeros(E, 1, Z)))
    latent = world.prior(torch.zeros(E, 1, H))
    assert torch.allclose(latent.std, torch.tensor(0.1 + math.log1p(math.exp(-1.0))))
    assert forecast.loss.mean.abs().max() == 0 and torch.allclose(forecast.loss.std, torch.ones(E, 1))
    assert forecast.carry.shape == (E, 1, CARRIES) and bool((forecast.carry == 0.5).all())
    assert forecast.divergence.sigmoid().max() < 0.01


def test_kl_by_hand_and_its_free_nats() -> None:
    near = Gaussian(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    far = Gaussian(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
    origin = Gaussian(torch.zeros(1, 2), torch.ones(1, 2))
    assert gaussian_kl(near, origin).item() == 0.5  # half the squared distance
    expected = 0.5 * 9 + 0.5 * (4 - 1 - math.log(4))
    assert gaussian_kl(far, origin).item() == pytest.approx(expected)
    theirs = kl_divergence(Normal(far.mean, far.std), Normal(near.mean, near.std)).sum()
    assert gaussian_kl(far, near).item() == pytest.approx(theirs.item())
    assert balanced_kl(near, origin).item() == pytest.approx(1.1)  # .5 nats are free: 1 + .1
    assert balanced_kl(far, origin).item() == pytest.approx(1.1 * expected)


def test_kl_pulls_the_prior_ten_times_as_hard_and_not_at_all_below_the_free_nats() -> None:
    for mean, pull in ((3.0, 3.0), (1.0, 0.0)):
        posterior, prior = torch.tensor([[mean]], requires_grad=True), torch.zeros(1, 1, requires_grad=True)
        balanced_kl(Gaussian(posterior, torch.ones(1, 1)), Gaussian(prior, torch.ones(1, 1))).backward()
        assert prior.grad is not None and posterior.grad is not None
        assert prior.grad.item() == pytest.approx(-pull) and posterior.grad.item() == pytest.approx(0.1 * pull)


@pytest.mark.parametrize("later", [3, 7])
def test_back_propagation_reaches_the_first_state(later: int) -> None:
    world, given = model(), batch(8)
    first = State(torch.zeros(E, 2, H, requires_grad=True), torch.zeros(E, 2, Z, requires_grad=True))
    states, _ = filtered(world, world.weights(), given, noise(8, E, 2, Z), first)
    outputs = world.heads(world.weights(), states[later].h_EBH, states[later].z_EBZ)
    outputs.sum().backward()
    for x in (first.h_EBH, first.z_EBZ):
        assert x.grad is not None and bool((x.grad.abs().amax(-1) > 0).all())


def test_cost_reaches_every_weight_and_learns_several_steps_ahead() -> None:
    world, given = model(), batch(8)
    teacher = WorldTraining(world, generator(), 8)
    teacher.cost(given).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in world.parameters())
    eps = noise(4, E, 8, Z)
    ahead = open_loop(world, world.weights(), [world.start(2)] * 4, given.actions, eps)
    grads = torch.autograd.grad(ahead.sum(), [world.prior_weight, world.w_hh])
    assert all(g.abs().sum() > 0 for g in grads)


def test_unknown_targets_cost_nothing() -> None:
    given, outputs = batch(4), noise(E, 2, 4, OUTPUTS).requires_grad_()
    nothing = Batch(given.features, given.actions, *(torch.full_like(x, math.nan) for x in (given.loss, given.grad)),
                    given.diverged, torch.full_like(given.carry, math.nan))  # fmt: skip
    prediction_loss(outputs, nothing).backward()
    assert outputs.grad is not None
    assert bool((outputs.grad[..., :-1] == 0).all()) and bool((outputs.grad[..., -1] != 0).all())


def test_prediction_loss_is_a_gaussian_likelihood() -> None:
    given, outputs = batch(4), noise(E, 2, 4, OUTPUTS)
    forecast = split(outputs)
    constant = 0.5 * math.log(2 * math.pi)
    parts = [
        -Normal(g.mean, g.std).log_prob(y).mean() - constant
        for g, y in ((forecast.loss, given.loss), (forecast.grad, given.grad))
    ]
    parts.append(torch.nn.functional.smooth_l1_loss(forecast.carry, given.carry))
    p = forecast.divergence.sigmoid()
    parts.append(-(given.diverged * p.log() + (1 - given.diverged) * (1 - p).log()).mean())
    assert prediction_loss(outputs, given).item() == pytest.approx(sum(parts).item(), rel=1e-5)  # type: ignore[union-attr]


def moment(step: int, **changes: object) -> Moment:
    values = {"loss": 2.0 + 0.01 * step, "baseline": 2.0, "noise": 0.5, "grad_norm": 2.0, "grad_baseline": 1.0}
    return Moment(step=step, features_F=[float(step)] * F, action_A=[1.0, 0.0, 0.0], **(values | changes))  # type: ignore[arg-type]


def test_replay_keeps_the_newest_and_windows_stay_together() -> None:
    replay = Replay(20)
    for step in [*range(30), *range(25, 40)]:  # training went back to step 25
        replay.add(moment(step))
    assert len(replay) == 20 and replay.newest(100)[:, 0].tolist() == list(range(25, 40))
    rows = replay.windows((4, 50), 5, generator())
    assert rows is not None and rows.shape == (4, 50, 5, WIDTH)
    steps = rows[..., 0]
    assert bool((steps.diff(dim=-1) == 1).all())
    assert {tuple(s.tolist()) for s in steps.flatten(0, 1)} >= {tuple(range(25, 30)), tuple(range(35, 40))}
    assert not torch.equal(steps[0], steps[1])  # each member draws its own
    assert replay.windows((4, 50), 16, generator()) is None


def test_targets_are_in_units_of_noise_and_broken_ones_unknown() -> None:
    replay = Replay(64)
    carry = [0.1 * i for i in range(10)] + [9.0]
    replay.add(moment(1, loss=3.0, carry_G=carry))
    replay.add(moment(2, loss=math.inf, grad_norm=0.0, diverged=True))
    replay.add(moment(3, loss=1e9))
    known = Batch.of(replay.newest(3))
    assert known.loss[0] == 2.0 and known.loss[1].isnan() and known.loss[2] == 10.0
    assert known.grad[0].item() == pytest.approx(math.log(2)) and known.grad[1].isnan()
    assert known.diverged.tolist() == [0.0, 1.0, 0.0]
    assert known.carry[0].tolist() == pytest.approx(carry[:10]) and bool(known.carry[1].isnan().all())
