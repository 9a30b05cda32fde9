"""Shapes that kernels are tried at, and the kernels on them where Triton interprets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.rssm_work import Case, converted, make

CASES = [
    Case(24, 5, 7, 3, 2),
    Case(24, 5, 7, 3, 2, per_path=True, shared=0),
    Case(32, 16, 1, 17, 9, per_path=True),
    Case(32, 16, 0, 1, 1),
    Case(64, 32, 7, 3, 2),
    Case(100, 5, 1, 17, 2),
    Case(100, 16, 0, 1, 9, per_path=True),
]


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
