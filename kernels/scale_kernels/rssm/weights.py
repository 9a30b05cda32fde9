"""The weights of an ensemble, the shapes that belong together, and the part of the gates that only actions decide."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class RssmWeights:
    """Weights of E members, each laid out as torch.nn.GRUCell and torch.nn.Linear keep theirs.

    E members, H hidden, Z stochastic latent, A action width, O head outputs. All of one dtype. Rows of the GRU are
    ordered reset, update, new; the prior's first Z rows are the mean, its last Z the raw standard deviation.
    """

    w_ih: Tensor  # (E, 3H, Z + A), over [z, action]
    w_hh: Tensor  # (E, 3H, H)
    b_ih: Tensor  # (E, 3H)
    b_hh: Tensor  # (E, 3H)
    prior_weight: Tensor  # (E, 2Z, H)
    prior_bias: Tensor  # (E, 2Z)
    head_weight: Tensor  # (E, O, H + Z), over [h, z]
    head_bias: Tensor  # (E, O)
    min_std: float = 0.1
    """Added to softplus(raw)."""

    @property
    def members(self) -> int:
        return self.w_hh.shape[0]

    @property
    def hidden(self) -> int:
        return self.w_hh.shape[2]

    @property
    def latent(self) -> int:
        return self.prior_weight.shape[1] // 2

    @property
    def actions(self) -> int:
        return self.w_ih.shape[2] - self.latent

    @property
    def outputs(self) -> int:
        return self.head_weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.w_hh.dtype

    def tensors(self) -> dict[str, Tensor]:
        """All weights by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "min_std"}

    def to(self, target: torch.device | torch.dtype | str) -> RssmWeights:
        """The same weights on another device or in another dtype."""
        return RssmWeights(**{name: x.to(target) for name, x in self.tensors().items()}, min_std=self.min_std)


def check(weights: RssmWeights, h0_EPH: Tensor, z0_EPZ: Tensor, actions: Tensor, eps_TEPZ: Tensor) -> None:
    """Raises ValueError naming the first tensor whose shape, dtype or device does not fit the others."""
    E, H, Z, A, O = weights.members, weights.hidden, weights.latent, weights.actions, weights.outputs  # noqa: E741
    T, P = eps_TEPZ.shape[0], h0_EPH.shape[1]
    expected = {
        "w_ih": (E, 3 * H, Z + A),
        "w_hh": (E, 3 * H, H),
        "b_ih": (E, 3 * H),
        "b_hh": (E, 3 * H),
        "prior_weight": (E, 2 * Z, H),
        "prior_bias": (E, 2 * Z),
        "head_weight": (E, O, H + Z),
        "head_bias": (E, O),
    }
    for name, tensor in weights.tensors().items():
        _fits(name, tensor, expected[name], weights.dtype, h0_EPH.device)
    _fits("h0", h0_EPH, (E, P, H), h0_EPH.dtype, h0_EPH.device)
    _fits("z0", z0_EPZ, (E, P, Z), h0_EPH.dtype, h0_EPH.device)
    _fits("eps", eps_TEPZ, (T, E, P, Z), h0_EPH.dtype, h0_EPH.device)
    _fits("actions", actions, (T, A) if actions.ndim == 2 else (T, E, P, A), h0_EPH.dtype, h0_EPH.device)
    if T == 0 or P == 0:
        raise ValueError(f"rssm: {T} steps of {P} paths: there must be at least one of each")


def _fits(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"rssm: {name} has shape {tuple(x.shape)}, but {shape} is needed")
    if x.dtype != dtype or x.device != device:
        raise ValueError(f"rssm: {name} is {x.dtype} on {x.device}, but {dtype} on {device} is needed")


def action_gates(weights: RssmWeights, actions: Tensor) -> Tensor:
    """What actions and biases add to the gates of every step, in one product for the whole horizon.

    `actions` (T, A), the same for every path, or (T, E, P, A). Returns (T, E, 1 or P, 3H). The hidden bias of the
    reset and update gates is inside; that of the new gate is not, because the reset gate scales it.
    """
    dtype, H = actions.dtype, weights.hidden
    w_EAG = weights.w_ih[:, :, weights.latent :].to(dtype).mT
    bias_EG = weights.b_ih.to(dtype) + weights.b_hh.to(dtype) * (torch.arange(3 * H, device=actions.device) < 2 * H)
    rounded = actions.to(weights.dtype).to(dtype)
    gates = (rounded[:, None, None] if actions.ndim == 2 else rounded) @ w_EAG
    return gates + bias_EG[:, None]
