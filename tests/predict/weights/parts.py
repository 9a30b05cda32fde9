"""Shards out of plain tensors, and statistics of trajectories that a test knows."""

from __future__ import annotations

import numpy as np
import torch

from scale.predict.kinds import KINDS, kind_of
from scale.protocols import Shard

SHAPES = {
    "model.embed_tokens.weight": (7, 5),
    "model.layers.0.self_attn.q_proj.weight": (5, 5),
    "model.layers.0.mlp.up_proj.weight": (9, 5),
    "model.layers.1.self_attn.q_proj.weight": (5, 5),
    "model.norm.weight": (5,),
}


def shards_of(params, grads=None, copies=None):
    grads, copies = grads or {}, copies or {}
    return {
        name: Shard(name, param, grads.get(name), tuple(param.shape), copies=copies.get(name, 1))
        for name, param in params.items()
    }


def drawn(seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def walk(count, seed=0):
    """(count, parameter) random walks with a trend: float32 values at every point, by name."""
    start, trend = drawn(seed), drawn(seed + 1, 0.01)
    return [
        {name: start[name] + n * trend[name] + drawn(seed + 2 + n, 0.02)[name] for name in SHAPES} for n in range(count)
    ]


def feed(direction, points, steps, lrs):
    """Show a direction the points as `StatisticsHook` would; `steps` and `lrs` lie before each point but the first."""
    for n, point in enumerate(points):
        lr = lrs[n] if n else 0.0
        update = [(point[name] - points[n - 1][name]) / lr for name in SHAPES] if n else None
        direction.observe(list(point.values()), update, steps[n] if n else 0, lr)


def stacked(points):
    """(points, elements) float64 of all parameters."""
    return np.stack([np.concatenate([x.double().numpy().ravel() for x in point.values()]) for point in points])


def flat(vectors):
    return np.concatenate([x.double().numpy().ravel() for x in vectors])


def made(direction, shards=None):
    return direction(shards or shards_of(drawn(0)))


def of_kind(tensors, kind):
    """All elements of one kind, float64."""
    mine = [t.double().numpy().ravel() for name, t in tensors.items() if KINDS[kind_of(name)] == kind]
    return np.concatenate(mine) if mine else np.zeros(0)
