"""fp32 tensors that live beside the masters, cut like them, in the canonical state of a checkpoint.

`predict/KEY/NAME`: for each key one tensor per parameter, of the parameter's global shape, whole on one rank. What two
ranks wrote under one strategy, one rank or another strategy reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Size, Tensor

from scale.errors import ScaleError
from scale.parallel.ranks import Ranks
from scale.parallel.whole import holders, owners, put_together, send_around
from scale.protocols import Shard, Shards

Companions = Mapping[str, Mapping[str, Tensor]]
"""Key -> parameter name -> tensor of the shape of this rank's shard of that parameter."""
PREFIX = "predict/"


def canonical(ranks: Ranks, shards: Shards, companions: Companions) -> dict[str, Tensor]:
    """What this rank owns, on the CPU; over all ranks every tensor is there once. Collective, a tensor at a time."""
    owner = owners(_shapes(shards, companions), ranks.world_size)
    counts = _counts(ranks, shards)
    out = {}
    for key, shard, local in _places(shards, companions):
        part = local if counts[shard.name] else local[:0]
        whole = put_together(ranks, part, _start(shard), Size(shard.global_shape), owner[key])
        if whole is not None:
            out[key] = whole.to("cpu", copy=True)
    return out


def blank(ranks: Ranks, saved: Mapping[str, Size]) -> dict[str, Tensor]:
    """Zeros for those of the saved companions (other names are passed over) that this rank reads."""
    shapes = {key: shape for key, shape in saved.items() if key.startswith(PREFIX)}
    return {
        key: torch.zeros(shapes[key]) for key, owner in owners(shapes, ranks.world_size).items() if owner == ranks.rank
    }


def restore(ranks: Ranks, shards: Shards, tensors: Mapping[str, Tensor], into: Companions) -> None:
    """Fill `into` from what each rank read. Collective. Raises ScaleError where something is missing or misfits."""
    owner = holders(ranks, [key for key in tensors if key.startswith(PREFIX)])
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key in owner}
    read = {key: tuple(shape) for part in ranks.gather(shapes) for key, shape in part.items()}
    for key, shard, local in _places(shards, into):
        if read.get(key) != shard.global_shape:
            found = f"has the shape {read[key]}, not {shard.global_shape}" if key in read else "is not there"
            raise ScaleError(f"the checkpoint does not fit: {key} {found}")
        mine = tensors[key] if owner[key] == ranks.rank else None
        whole_N = send_around(ranks, mine, Size(shard.global_shape), owner[key])
        local.copy_(whole_N[_start(shard) :][: local.numel()].view(local.shape))


def _places(shards: Shards, companions: Companions) -> Iterator[tuple[str, Shard, Tensor]]:
    """In the same order on every rank."""
    for key in sorted(companions):
        for name, shard in shards.items():
            yield f"{PREFIX}{key}/{name}", shard, companions[key][name]


def _shapes(shards: Shards, companions: Companions) -> dict[str, Size]:
    return {key: Size(shard.global_shape) for key, shard, _ in _places(shards, companions)}


def _start(shard: Shard) -> int:
    """The first element of the shard in the flattened parameter."""
    return shard.offset if shard.flat else shard.offset * math.prod(shard.global_shape[1:])


def _counts(ranks: Ranks, shards: Shards) -> dict[str, bool]:
    """Whether this rank is the first of those that hold the same part."""
    if all(shard.copies == 1 for shard in shards.values()):
        return dict.fromkeys(shards, True)
    parts = ranks.gather({name: [shard.offset, shard.param.numel()] for name, shard in shards.items()})
    return {name: [part[name] for part in parts].index(parts[ranks.rank][name]) == ranks.rank for name in shards}
