"""Muon on sharded matrices: momentum stays sharded, each update is orthogonalised whole, by one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


def muon_class(params: Sequence[Tensor]) -> type[torch.optim.Muon]:
    """torch's Muon, or the one for sharded parameters."""
    return ShardedMuon if any(isinstance(p, DTensor) for p in params) else torch.optim.Muon


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon on DTensors cut by rows, as FSDP2 cuts them, with the same results.

    Newton-Schulz needs the whole matrix. Each rank orthogonalises one matrix out of as many as there are ranks: it
    receives all rows of that matrix and sends back what it made of them. So the work of a step is divided by the number
    of ranks, and a rank holds one whole matrix at a time. Rows travel in bf16, in which Newton-Schulz computes.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            newton_schulz = partial(
                _zeropower_via_newtonschulz,
                ns_coefficients=group["ns_coefficients"],
                ns_steps=group["ns_steps"],
                eps=group["eps"],
            )
            for matrices in _shares([param for param in group["params"] if param.grad is not None]):
                updates = [self._update(param, group) for param in matrices]
                for param, rows in zip(matrices, _orthogonal(matrices, updates, newton_schulz), strict=True):
                    local = param.to_local()
                    local.mul_(1 - group["lr"] * group["weight_decay"])
                    local.add_(rows, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], param.shape))

    def _update(self, param: DTensor, group: dict[str, Any]) -> Tensor:
        """This rank's rows of what is to be orthogonalised, in bf16."""
        state, grad = self.state[param], cast(DTensor, param.grad)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum, rows = state["momentum_buffer"].to_local(), grad.to_local()
        momentum.lerp_(rows, 1 - group["momentum"])
        return (rows.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum).bfloat16()


def _shares(params: Sequence[DTensor]) -> Iterator[list[DTensor]]:
    """At most one matrix for each rank, of about the same size, in the same order on every rank."""
    by_size = sorted(params, key=lambda param: param.numel(), reverse=True)
    count = params[0].device_mesh.size() if params else 1
    for start in range(0, len(by_size), count):
        yield by_size[start : start + count]


def _orthogonal(
    matrices: Sequence[DTensor], updates: Sequence[Tensor], newton_schulz: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """This rank's rows of each orthogonalised matrix. With copies of shards (HSDP) each copy works on some matrices."""
    mesh = matrices[0].device_mesh
    shards = mesh.size(mesh.ndim - 1)
    if mesh.ndim == 1:
        return _exchange(matrices, updates, newton_schulz)
    first = mesh.get_local_rank(0) * shards
    mine = slice(first, first + shards)
    out = [torch.empty_like(rows) for rows in updates]
    if matrices[mine]:
        out[mine] = _exchange(matrices[mine], updates[mine], newton_schulz)
    for i, rows in enumerate(out):
        if rows.numel():
            dist.broadcast(rows, group=mesh.get_group(0), group_src=i // shards)
    return out


def _exchange(
    matrices: Sequence[DTensor], updates: Sequence[Tensor], newton_schulz: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Matrix i goes to rank i of the shard group as rows, and comes back as rows."""
    mesh = matrices[0].device_mesh
    dim = mesh.ndim - 1
    rank, ranks, group = mesh.get_local_rank(dim), mesh.size(dim), mesh.get_group(dim)
    mine = matrices[rank].shape if rank < len(matrices) else torch.Size((0, 0))
    ends = [_first_row(mine[0], ranks, r) for r in range(ranks + 1)]
    theirs = [rows.numel() for rows in updates] + [0] * (ranks - len(updates))
    whole_sizes = [(end - start) * mine[1] for start, end in pairwise(ends)]
    sent = torch.cat([rows.flatten() for rows in updates])
    whole = sent.new_empty(mine.numel())
    dist.all_to_all_single(whole, sent, whole_sizes, theirs, group=group)
    if mine.numel():
        whole = newton_schulz(whole.view(mine)).flatten()
    dist.all_to_all_single(sent, whole, theirs, whole_sizes, group=group)
    return [part.view_as(rows) for part, rows in zip(sent.split(theirs), updates, strict=False)]


def first_row(param: DTensor) -> int:
    """Row of the whole parameter at which this rank's shard starts (FSDP2 cuts dimension 0 into equal chunks, of which
    the last may be shorter or empty)."""
    mesh = param.device_mesh
    dim = mesh.ndim - 1  # with copies (HSDP) the mesh is (replicate, shard)
    return _first_row(param.shape[0], mesh.size(dim), mesh.get_local_rank(dim))


def _first_row(rows: int, ranks: int, rank: int) -> int:
    return min(rank * -(-rows // ranks), rows)
