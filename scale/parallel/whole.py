"""Tensors that are cut over ranks, whole on one of them: who holds which, and how they get there, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Size, Tensor

from scale.parallel.ranks import Ranks


def owners(shapes: Mapping[str, Size], world_size: int) -> dict[str, int]:
    """Which rank holds a tensor whole: the largest first, each to the rank that has least so far."""
    load, out = [0] * world_size, {}
    for key in sorted(shapes, key=lambda k: (-shapes[k].numel(), k)):
        rank = load.index(min(load))
        load[rank] += shapes[key].numel()
        out[key] = rank
    return out


def put_together(ranks: Ranks, part: Tensor, start: int, shape: Size, owner: int | None = None) -> Tensor | None:
    """A fp32 tensor of which each rank has `part`, a run of its elements from `start`: whole on `owner` (None: on every
    rank). Collective."""
    full = torch.zeros(shape.numel(), dtype=torch.float32, device=ranks.device)
    full[start : start + part.numel()] = part.reshape(-1)
    bits = full.view(torch.int32)  # all but one rank add the integer 0: no float is rounded or loses its sign
    if ranks.world_size > 1 and owner is None:
        dist.all_reduce(bits)
    elif ranks.world_size > 1:
        dist.reduce(bits, owner)
    return full.view(shape) if owner in (None, ranks.rank) else None


def send_around(ranks: Ranks, whole: Tensor | None, shape: Size, owner: int) -> Tensor:
    """What `owner` has whole, flat in fp32 on every rank. Collective."""
    if whole is None:
        whole = torch.empty(shape)
    whole = whole.to(ranks.device, torch.float32).contiguous()
    if ranks.world_size > 1:
        dist.broadcast(whole, owner)
    return whole.view(-1)


def holders(ranks: Ranks, keys: list[str]) -> dict[str, int]:
    """The first rank that holds each of the keys, which differ by rank. Collective."""
    held = ranks.gather(keys)
    return {key: rank for rank in reversed(range(len(held))) for key in held[rank]}
