"""Random rollouts, and the kernels on them where Triton interprets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    """Bytes of shared memory the kernel is told of; 0: weights never stay on the chip."""


CASES = [
    Case(24, 5, 7, 3, 2),
    Case(24, 5, 7, 3, 2, per_path=True, shared=0),
    Case(32, 16, 1, 17, 9, per_path=True),
    Case(32, 16, 0, 1, 1),
    Case(64, 32, 7, 3, 2),
    Case(100, 5, 1, 17, 2),
    Case(100, 16, 0, 1, 9, per_path=True),
]

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


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run_kernel(case: Case) -> tuple[str, tuple[Tensor, ...]]:
    """For the interpreting process: name of the chosen kernel, and its results."""
    from scale_kernels.rssm.launch import choose, run
    from triton.runtime.interpreter import InterpretedFunction

    single = converted(make(case), torch.float32)
    launch = choose(single[0], case.paths, case.shared, processors=4)
    assert isinstance(launch.kernel, InterpretedFunction)
    with poisoned_memory():
        return launch.kernel.__name__, run(launch, *single)
