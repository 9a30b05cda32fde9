"""Ranks, tensors and kernels that are not there: they have shapes, types and lifetimes, but no values and no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Size, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AttentionInterface

from scale.errors import ScaleError
from scale.parallel.ranks import Ranks

FUSED = "scale_planned"
"""Name, as an attention implementation of transformers, of attention that keeps what a fused GPU kernel keeps."""


@contextmanager
def fake_ranks(world_size: int) -> Iterator[Ranks]:
    """Rank 0 of `world_size` processes that do not exist: collectives return at once, sharding is real.

    Raises ScaleError inside a process group, because torch has one default group for each process.
    """
    if dist.is_initialized():
        raise ScaleError("a plan is made by one process alone: this one has joined a process group")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield Ranks(0, world_size, 0, "cpu")
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Every tensor made inside is fake; a number read from one is 1, so that code which looks at a norm runs on."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Ones():
        yield


class _Ones(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped_product(*args, **(kwargs or {}))
        if func is torch.ops.aten.split.Tensor and args[0].is_meta and not isinstance(args[0], FakeTensor):
            with _disable_current_modes():  # 1,024 shards of each parameter, of which one is kept: seconds as fakes
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """What a product of groups gives. Its kernels multiply fp32 as well, for which torch has no rule of shapes."""
    rows, columns = a.shape[-2], b.shape[-1]
    if a.dim() == b.dim() == 2:  # of each group its columns of `a` and rows of `b`
        assert offs is not None
        return a.new_empty(len(offs), rows, columns)
    return a.new_empty(len(a), rows, columns) if a.dim() == b.dim() == 3 else a.new_empty(rows, columns)


def fake_weights(name: str, shape: Size) -> Tensor:
    """A `Weights` without values."""
    return torch.empty(shape)


def _fused(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Keeps queries, keys, values, the output and one number a row, as flash attention does (arXiv 2205.14135); neither
    scores nor a mask exist, and keys and values are not repeated for grouped queries."""
    out_BHLD, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_BHLD, key_BKLD, value_BKLD, 0.0, True
    )
    return out_BHLD.transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, _fused)
