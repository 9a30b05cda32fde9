"""A rollout to try: its sizes, random weights and inputs, and how far two results are apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scale_kernels.rssm import RssmWeights
from torch import Tensor


@dataclass(frozen=True)
class Case:
    hidden: int
    latent: int
    actions: int
    paths: int
    steps: int
    per_path: bool = False
    shared: int = 200 * 1024
    """Bytes of shared memory that tests tell the kernel of; 0: weights never stay on the chip."""


Given = tuple[RssmWeights, Tensor, Tensor, Tensor, Tensor]


def make(case: Case, members: int = 2, outputs: int = 15, dtype: torch.dtype = torch.float64, seed: int = 0) -> Given:
    """Weights, h0, z0, actions and noise of a case."""
    E, P, T, H, Z, A = members, case.paths, case.steps, case.hidden, case.latent, case.actions
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, fan: int = 1) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).div(fan**0.5).to(dtype)

    weights = RssmWeights(
        w_ih=normal(E, 3 * H, Z + A, fan=Z + A),
        w_hh=normal(E, 3 * H, H, fan=H),
        b_ih=normal(E, 3 * H, fan=4),
        b_hh=normal(E, 3 * H, fan=4),
        prior_weight=normal(E, 2 * Z, H, fan=H),
        prior_bias=normal(E, 2 * Z, fan=4),
        head_weight=normal(E, outputs, H + Z, fan=H + Z),
        head_bias=normal(E, outputs, fan=4),
        min_std=0.07,
    )
    actions = normal(T, E, P, A) if case.per_path else normal(T, A)
    return weights, normal(E, P, H), normal(E, P, Z), actions, normal(T, E, P, Z)


def converted(given: Given, target: torch.dtype | str) -> Given:
    """The same numbers in another dtype or on another device."""
    weights, *tensors = given
    return (weights.to(target), *(x.to(target) for x in tensors))  # type: ignore[return-value]


def differences(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> list[float]:
    """Largest absolute difference of outputs, h and z; NaN if anything is."""
    return [float((x.double().cpu() - y.double().cpu()).abs().max()) for x, y in zip(found, right, strict=True)]
