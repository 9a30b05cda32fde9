"""Kernels interpreted on a CPU, in a process of its own: the setting must come before triton and must not reach other tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any


def interpreted(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` where Triton interprets. The function stands at the top of a module and imports kernels itself."""
    return _process().submit(function, *arguments).result(timeout=300)


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare)


def _prepare() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
