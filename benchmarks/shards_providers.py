"""What shards_kernel.py compares: each provider as a function of the same lists of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement

import torch
from scale_kernels.delta.op import DeltaPlan
from scale_kernels.delta.reference import delta_reference
from scale_kernels.encode.op import EncodePlan
from scale_kernels.encode.reference import encode_reference
from scale_kernels.tensor_table import first_indices
from torch import Tensor

LAYERS, GROUPS = 24, 16
SEED = 1
Run = Callable[[], Tensor | None]
"""One call; statistics are returned, a step is taken in place."""


@dataclass
class Shards:
    """Lists of `size` elements in all, the tensors of a 24-layer model, and the coefficients of a step along lists 1, 2 ..."""

    lists: list[list[Tensor]]
    group_N: list[int]
    c_KG: Tensor

    @property
    def bytes_read(self) -> int:
        return sum(x.numel() * x.element_size() for tensors in self.lists for x in tensors)


def make_shards(size: int, lists: int, dtype: torch.dtype, device: str) -> Shards:
    shapes, group_N = model_shapes(size)
    generator = torch.Generator(device).manual_seed(0)
    made = [
        [torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in shapes] for _ in range(lists)
    ]
    c_KG = torch.randn(lists - 1, GROUPS, device=device, generator=generator) * 1e-3
    return Shards(made, group_N, c_KG)


def model_shapes(size: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Per layer four D x D, two 4D x D and two of D; the rest is one vector. With the group of each."""
    width = math.isqrt(size // (12 * LAYERS + 1))
    layer = [(width, width)] * 4 + [(4 * width, width)] * 2 + [(width,)] * 2
    shapes = layer * LAYERS
    rest = size - sum(math.prod(shape) for shape in shapes)
    if rest < 0:
        raise ValueError(f"{size} elements are too few for {LAYERS} layers")
    groups = [n // len(layer) * GROUPS // LAYERS for n in range(len(shapes))]
    return [*shapes, (rest,)], [*groups, GROUPS - 1]


def encode_providers(shards: Shards, device: str) -> dict[str, Run]:
    plan = EncodePlan(shards.group_N, GROUPS)
    runs: dict[str, Run] = {
        "triton" if device == "cuda" else "scale": lambda: plan(*shards.lists),
        "torch._foreach": lambda: foreach_encode(shards),
    }
    if device == "cuda":
        runs["torch.compile"] = lambda: compiled_encode(shards)
    else:
        runs["reference"] = lambda: encode_reference(shards.lists, shards.group_N, GROUPS)
    return runs


def delta_providers(shards: Shards, device: str) -> dict[str, Run]:
    params, *directions = shards.lists
    plan = DeltaPlan(shards.group_N, GROUPS)
    first_index_N = first_indices([x.numel() for x in params])
    runs: dict[str, Run] = {
        "triton" if device == "cuda" else "scale": lambda: plan(params, directions, shards.c_KG, SEED),
        "torch._foreach": lambda: foreach_delta(shards),
    }
    if device == "cuda":
        runs["torch.compile"] = lambda: compiled_delta(shards)
    else:
        runs["reference"] = lambda: delta_reference(
            params, directions, shards.c_KG, shards.group_N, first_index_N, SEED
        )
    return runs


def foreach_encode(shards: Shards) -> Tensor:
    """Ten lists of products, each summed tensor by tensor."""
    columns = []
    for x, y in combinations_with_replacement(shards.lists, 2):
        columns.append(torch.stack([product.sum(dtype=torch.float32) for product in torch._foreach_mul(x, y)]))
    gradients = shards.lists[1]
    largest_N = torch.stack(torch._foreach_norm(gradients, math.inf)).float()
    bad_N = torch.stack([(~x.isfinite()).sum() for x in gradients]).float()
    return _by_group(torch.stack([*columns, largest_N, bad_N], 1), shards.group_N)


def _by_group(rows_NC: Tensor, group_N: Sequence[int]) -> Tensor:
    ids_N = torch.tensor(group_N).to(rows_NC.device, non_blocking=True)
    out_GC = rows_NC.new_zeros(GROUPS, rows_NC.shape[1]).index_add_(0, ids_N, rows_NC)
    largest_G = rows_NC.new_zeros(GROUPS).scatter_reduce_(0, ids_N, rows_NC[:, 10], "amax")
    out_GC[:, 10] = largest_G
    return out_GC


def compiled_encode(shards: Shards) -> Tensor:
    """One compiled function over each index: its tensors are read once."""
    rows = [_compiled(_encode_one)(*(x.view(-1) for x in four)) for four in zip(*shards.lists, strict=True)]
    return _by_group(torch.stack(rows), shards.group_N)


def _encode_one(p: Tensor, g: Tensor, d: Tensor, u: Tensor) -> Tensor:
    wide = [x.float() for x in (p, g, d, u)]
    sums = [(x * y).sum() for x, y in combinations_with_replacement(wide, 2)]
    return torch.stack([*sums, wide[1].abs().max(), (~wide[1].isfinite()).sum().float()])


def foreach_delta(shards: Shards) -> None:
    """Coefficients as numbers on the host, so it waits for the device as the kernel's check does. bf16: to the nearest."""
    params, *directions = shards.lists
    for row, tensors in zip(shards.c_KG.tolist(), directions, strict=True):
        products = torch._foreach_mul(tensors, [row[group] for group in shards.group_N])
        torch._foreach_add_(params, products)


def compiled_delta(shards: Shards) -> None:
    """One compiled function over each index. bf16: to the nearest."""
    params, *directions = shards.lists
    columns = shards.c_KG.unbind(1)
    for n, param in enumerate(params):
        _compiled(_delta_one)(param.view(-1), columns[shards.group_N[n]], *(x[n].view(-1) for x in directions))


def _delta_one(param: Tensor, c_K: Tensor, *directions: Tensor) -> None:
    moved = param.float()
    for k, direction in enumerate(directions):
        moved = moved + c_K[k] * direction.float()
    param.copy_(moved)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)
