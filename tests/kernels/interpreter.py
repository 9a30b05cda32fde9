"""Kernels interpreted on a CPU, in a process of its own: the setting must come before triton and must not reach other tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

from packaging.version import Version


def interpreted(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` where Triton interprets. The function stands at the top of a module and imports kernels itself."""
    return _process().submit(function, *arguments).result(timeout=300)


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare)


def _prepare() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import triton

    torch.set_num_threads(1)
    if Version(triton.__version__) < Version("3.7"):
        _squeeze_indices()


def _squeeze_indices() -> None:
    """What triton 3.7 does: numpy from 2.4 makes a number only of arrays without dimensions, and scalars here have one."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = with_index
