"""What the ranks of test_muon.py do: matrices cut over them, stepped beside torch.optim.Muon on whole ones."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import scale.parallel.muon as muon

SHAPES = [(9, 4), (4, 9), (1, 6), (8, 8), (3, 5), (6, 6), (12, 3)]
"""More than there are ranks, odd, and with fewer rows than ranks."""
OPTIONS = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.8, "adjust_lr_fn": "match_rms_adamw"}
STEPS = 3


def step(ranks, meshes):
    """For each mesh: relative distances to the whole matrices after every step, the plain ones' own change when decay or
    Nesterov are left out, and how many matrices were orthogonalised on this rank in each step."""
    return {str(shape): _on(shape) for shape in meshes}


def _on(mesh_shape):
    mesh = init_device_mesh("cpu", tuple(mesh_shape))
    places = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    rng = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=rng) for shape in SHAPES]
    cut = [torch.nn.Parameter(distribute_tensor(matrix, mesh, places)) for matrix in whole]
    plain = {
        name: [torch.nn.Parameter(matrix.clone()) for matrix in whole] for name in ("same", "no decay", "no nesterov")
    }
    changed = {"same": {}, "no decay": {"weight_decay": 0.0}, "no nesterov": {"nesterov": False}}
    optimizers = {name: torch.optim.Muon(plain[name], **(OPTIONS | changed[name])) for name in plain}
    sharded = muon.ShardedMuon(cut, **OPTIONS)
    away, calls = {name: [] for name in plain}, []
    for _ in range(STEPS):
        grads = [torch.randn(shape, generator=rng) for shape in SHAPES]
        for name, params in plain.items():
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            optimizers[name].step()
        for param, grad in zip(cut, grads, strict=True):
            param.grad = distribute_tensor(grad, mesh, places)
        calls.append(_counted(sharded.step))
        for name, params in plain.items():
            away[name].append(max(_away(a, b) for a, b in zip(cut, params, strict=True)))
    momenta = [sharded.state[param]["momentum_buffer"].full_tensor() for param in cut]
    kept = [optimizers["same"].state[param]["momentum_buffer"] for param in plain["same"]]
    return {
        "away": away,
        "calls": calls,
        "momenta": max((a - b).abs().max().item() for a, b in zip(momenta, kept, strict=True)),
    }


def _away(cut, whole):
    return ((cut.full_tensor() - whole).norm() / whole.norm()).item()


def _counted(run):
    """How often one call orthogonalises a matrix."""
    original, count = muon._zeropower_via_newtonschulz, 0

    def counted(*args, **options):
        nonlocal count
        count += 1
        return original(*args, **options)

    muon._zeropower_via_newtonschulz = counted
    try:
        run()
    finally:
        muon._zeropower_via_newtonschulz = original
    return count
