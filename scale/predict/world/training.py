"""Training of the world model: truncated back-propagation through windows of moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scale_kernels.rssm import RssmWeights
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss

from scale.predict.packing import pack, unpack
from scale.predict.world.replay import Batch, Replay
from scale.predict.world.rssm import Gaussian, RssmEnsemble, State, split

WINDOWS = 8
"""Windows of each member in an update."""
LEARNING_RATE = (2e-2, 5e-3)
"""Of Adam: at the start, when a run has seen few updates and each one counts, and at the least."""
FALL = 100
"""Updates after which it is half of what it was."""
CLIP = 10.0
FREE_NATS = 1.0
"""KL below this costs nothing, so that the posterior may know something. DreamerV3, arXiv 2301.04104, equation 4."""
REPRESENTATION = 0.1
"""Weight of pulling the posterior to the prior, against 1 for the prior to the posterior (the same paper)."""


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) in nats, summed over the last dimension."""
    ratio = (p.std / q.std) ** 2
    return 0.5 * (ratio + ((p.mean - q.mean) / q.std) ** 2 - 1 - ratio.log()).sum(-1)


def balanced_kl(posterior: Gaussian, prior: Gaussian) -> Tensor:
    """Both directions of learning, each free up to FREE_NATS per latent state; mean over all states."""

    def held(x: Gaussian) -> Gaussian:
        return Gaussian(x.mean.detach(), x.std.detach())

    dynamics = gaussian_kl(held(posterior), prior).clamp(min=FREE_NATS)
    representation = gaussian_kl(posterior, held(prior)).clamp(min=FREE_NATS)
    return dynamics.mean() + REPRESENTATION * representation.mean()


def filtered(
    model: RssmEnsemble, weights: RssmWeights, batch: Batch, eps_LEBZ: Tensor | None, start: State | None = None
) -> tuple[list[State], list[Gaussian]]:
    """States and posteriors of L moments of windows (E, B, L, ...); without noise the latents are their means."""
    state = start or model.start(batch.features.shape[1])
    embedded = model.embed(batch.features).unbind()
    states, posteriors = [], []
    for t, (x_EBH, action_EBA) in enumerate(zip(embedded, batch.actions.unbind(2), strict=True)):
        h_EBH = model.advance(weights, state, action_EBA)
        posterior = model.posterior(h_EBH, x_EBH)
        z_EBZ = posterior.mean if eps_LEBZ is None else posterior.sample(eps_LEBZ[t])
        state = State(h_EBH, z_EBZ)
        states.append(state)
        posteriors.append(posterior)
    return states, posteriors


def open_loop(
    model: RssmEnsemble, weights: RssmWeights, states: Sequence[State], actions_EBLA: Tensor, eps_KESZ: Tensor
) -> Tensor:
    """From each of S states, the first moments of the window, K steps without features: outputs (K, E, S * B, O)."""
    K, S = len(eps_KESZ), len(states)
    state = State(torch.cat([s.h_EBH for s in states], 1), torch.cat([s.z_EBZ for s in states], 1))
    ahead = actions_EBLA.transpose(1, 2)
    imagined = []
    for k in range(K):
        action = ahead[:, k + 1 : k + 1 + S].flatten(1, 2)
        h = model.advance(weights, state, action)
        state = State(h, model.prior(h).sample(eps_KESZ[k]))
        imagined.append(state)
    h_ENH, z_ENZ = torch.cat([s.h_EBH for s in imagined], 1), torch.cat([s.z_EBZ for s in imagined], 1)
    return model.heads(weights, h_ENH, z_ENZ).unflatten(1, (K, -1)).transpose(0, 1)


def prediction_loss(outputs: Tensor, batch: Batch) -> Tensor:
    """Mean cost of raw outputs (..., O) against what came; unknown targets cost nothing."""
    predicted = split(outputs)
    diverged = binary_cross_entropy_with_logits(predicted.divergence, batch.diverged)
    carry = smooth_l1_loss(predicted.carry, _filled(batch.carry, predicted.carry))
    return _nll(predicted.loss, batch.loss) + _nll(predicted.grad, batch.grad) + carry + diverged


class WorldTraining:
    """The optimizer and the random numbers of training; `update` is one step of Adam for all members."""

    def __init__(self, model: RssmEnsemble, generator: torch.Generator, bptt: int):
        self.model, self.generator, self.bptt = model, generator, bptt
        self.optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
        self.updates = 0

    def update(self, replay: Replay) -> float | None:
        """Learn from windows that each member draws for itself. Returns the cost; None if no window is long enough."""
        E = self.model.w_hh.shape[0]
        rows = replay.windows((E, WINDOWS), self.bptt, self.generator)
        if rows is None:
            return None
        self.optimizer.zero_grad()
        cost = self.cost(Batch.of(rows.to(self.model.w_hh.device)))
        cost.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP * E)
        first, least = LEARNING_RATE
        self.optimizer.param_groups[0]["lr"] = max(first / (1 + self.updates / FALL), least)
        self.optimizer.step()
        self.updates += 1
        return float(cost.detach()) / E

    def cost(self, batch: Batch) -> Tensor:
        """Of windows (E, B, L, ...), summed over members: step by step, several steps ahead, and the KL."""
        E, B, L = batch.loss.shape
        Z, K = self.model.latent, L // 2
        S = L - K
        weights = self.model.weights()
        states, posteriors = filtered(self.model, weights, batch, self._noise(L, E, B, Z))
        h_LEBH, z_LEBZ = torch.stack([s.h_EBH for s in states]), torch.stack([s.z_EBZ for s in states])
        h_ENH, z_ENZ = (x.transpose(0, 1).flatten(1, 2) for x in (h_LEBH, z_LEBZ))
        one_step = prediction_loss(self.model.heads(weights, h_ENH, z_ENZ), _moments(batch, 0, L))
        eps = self._noise(K, E, S * B, Z)
        ahead = open_loop(self.model, weights, states[:S], batch.actions, eps)
        later = [_moments(batch, k + 1, S) for k in range(K)]
        several = prediction_loss(
            ahead, Batch(*(torch.stack(column) for column in zip(*map(_columns, later), strict=True)))
        )
        means, stds = torch.stack([p.mean for p in posteriors]), torch.stack([p.std for p in posteriors])
        prior = self.model.prior(h_ENH)
        seen = Gaussian(*(x.transpose(0, 1).flatten(1, 2) for x in (means, stds)))
        return E * (one_step + several + balanced_kl(seen, prior))

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.model.w_hh.device)

    def state_dict(self) -> dict[str, Any]:
        """JSON: weights, Adam's moments and the random numbers."""
        moments = [
            {name: pack(x) for name, x in self.optimizer.state[p].items()} if p in self.optimizer.state else None
            for p in self.model.parameters()
        ]
        weights = {name: pack(x) for name, x in self.model.state_dict().items()}
        generator = pack(self.generator.get_state())
        return {"weights": weights, "moments": moments, "generator": generator, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises RuntimeError if the sizes differ."""
        self.model.load_state_dict({name: unpack(x) for name, x in state["weights"].items()})
        self.optimizer.state.clear()
        for p, moments in zip(self.model.parameters(), state["moments"], strict=True):
            if moments is not None:
                self.optimizer.state[p] = {
                    name: unpack(x) if name == "step" else unpack(x).to(p.device) for name, x in moments.items()
                }
        self.generator.set_state(unpack(state["generator"]))
        self.updates = state["updates"]


def _moments(batch: Batch, first: int, count: int) -> Batch:
    """`count` moments of every window, laid out (E, count * B): the moment outside, the window inside."""
    return Batch(*(x[:, :, first : first + count].transpose(1, 2).flatten(1, 2) for x in _columns(batch)))


def _columns(batch: Batch) -> tuple[Tensor, ...]:
    return batch.features, batch.actions, batch.loss, batch.grad, batch.diverged, batch.carry


def _filled(target: Tensor, predicted: Tensor) -> Tensor:
    """The prediction where the target is unknown: no error, no gradient."""
    return torch.where(target.isnan(), predicted.detach(), target)


def _nll(predicted: Gaussian, target: Tensor) -> Tensor:
    known = ~target.isnan()
    error = (torch.where(known, target, predicted.mean.detach()) - predicted.mean) / predicted.std
    return torch.where(known, 0.5 * error**2 + predicted.std.log(), 0.0).mean()
