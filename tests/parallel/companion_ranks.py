"""What several processes do for test_companions.py. Values are made from names, so that every rank knows all of them."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as dcp

from scale.errors import ScaleError
from scale.parallel import companions
from scale.protocols import Shard

SHAPES = {"embed.weight": (7, 3), "layer.0.weight": (5, 4), "norm.weight": (5,), "tiny": (1,), "experts": (3, 2, 2)}
KEYS = ("drift", "carry.params")


def whole(key, name):
    """Among others a negative zero, infinity and a NaN with a payload."""
    rng = torch.Generator().manual_seed(sum(map(ord, key + name)))
    value = torch.randn(SHAPES[name], generator=rng)
    value.view(-1)[0] = -0.0
    if value.numel() > 5:
        value.view(-1)[3:6] = torch.tensor([2143289999, -8388608, 1], dtype=torch.int32).view(torch.float32)
    return value


def cut(ranks, kind):
    """Shards as strategies cut them: whole, by rows, with copies, or flat runs of which some are empty."""
    copies = ranks.world_size if kind == "copies" else 2 if kind == "pairs" else 1
    rank, count = ranks.rank % (ranks.world_size // copies), ranks.world_size // copies
    out = {}
    for name, shape in SHAPES.items():
        length = torch.Size(shape).numel() if kind == "flat" else shape[0]
        size = -(-length // count)
        begin, end = min(rank * size, length), min((rank + 1) * size, length)
        room = torch.zeros(end - begin) if kind == "flat" else torch.zeros(end - begin, *shape[1:])
        out[name] = Shard(name, room, None, shape, begin, kind == "flat", copies)
    return out


def local(shards, key, name):
    shard, value = shards[name], whole(key, name)
    value = value.view(-1) if shard.flat else value
    return value[shard.offset : shard.offset + len(shard.param)].clone()


def write(ranks, kind, folder):
    shards = cut(ranks, kind)
    beside = {key: {name: local(shards, key, name) for name in shards} for key in KEYS}
    tensors = companions.canonical(ranks, shards, beside)
    dcp.save(tensors, checkpoint_id=folder, no_dist=ranks.world_size == 1)
    return sorted(tensors)


def read(ranks, kind, folder):
    """Whether every bit is back, and what the rank held whole meanwhile."""
    shards = cut(ranks, kind)
    into = {key: {name: torch.full_like(s.param, 7.0) for name, s in shards.items()} for key in KEYS}
    saved = {
        name: entry.size for name, entry in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    }
    room = companions.blank(ranks, saved | {"model/embed.weight": torch.Size((7, 3))})
    dcp.load(room, checkpoint_id=folder, no_dist=ranks.world_size == 1)
    companions.restore(ranks, shards, room, into)
    same = [
        torch.equal(into[key][name].view(torch.int32), local(shards, key, name).view(torch.int32))
        for key in KEYS
        for name in SHAPES
    ]
    return {"same": all(same) and len(same) == 10, "held": sorted(room), "refused": refused(ranks, shards, room)}


def refused(ranks, shards, room):
    said = []
    into = {"drift": {name: torch.zeros_like(s.param) for name, s in shards.items()}}
    other = {key: value[:1] if key.endswith("drift/tiny") else value for key, value in room.items()}
    other = {key: torch.zeros(2, 2) if key == "predict/drift/norm.weight" else value for key, value in other.items()}
    for tensors, where in ((room, {"window": into["drift"]}), (other, into)):
        try:
            companions.restore(ranks, shards, tensors, where)
        except ScaleError as error:
            said.append(str(error))
    return said


def round_trips(ranks, folder):
    """Written and read under every way to cut, the written one by one process before this."""
    out = {"from one": {kind: read(ranks, kind, f"{folder}/one") for kind in ("rows", "flat", "copies")}}
    for kind in ("rows", "flat", "copies"):
        out[kind] = {"owned": write(ranks, kind, f"{folder}/{kind}")}
        out[kind] |= {other: read(ranks, other, f"{folder}/{kind}") for other in ("rows", "flat")}
    return out


def pairs(ranks, folder):
    """Four ranks, of which two and two hold the same rows."""
    return [write(ranks, "pairs", folder), read(ranks, "pairs", folder)]
