"""Muon on sharded matrices: momentum stays sharded, each update is orthogonalised whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


def muon_class(params: Sequence[Tensor]) -> type[torch.optim.Muon]:
    """torch's Muon, or the one for sharded parameters."""
    return ShardedMuon if any(isinstance(p, DTensor) for p in params) else torch.optim.Muon


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon, whose arithmetic on DTensors fails where an update ends up placed unlike its parameter.

    Newton-Schulz needs the whole matrix: every rank gathers each update and orthogonalises it, as all others do, then
    applies its own rows.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._move(param, group)

    def _move(self, param: DTensor, group: dict[str, Any]) -> None:
        state, grad = self.state[param], cast(DTensor, param.grad)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        update = cast(DTensor, grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum)
        whole = _zeropower_via_newtonschulz(
            update.full_tensor(), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        local, first = param.to_local(), first_row(param)
        local.mul_(1 - group["lr"] * group["weight_decay"])
        rows = whole[first : first + len(local)]
        local.add_(rows, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], param.shape))


def first_row(param: DTensor) -> int:
    """Row of the whole parameter at which this rank's shard starts (FSDP2 cuts dimension 0 into equal chunks, of which
    the last may be shorter or empty)."""
    mesh = param.device_mesh
    dim = mesh.ndim - 1  # with copies (HSDP) the mesh is (replicate, shard)
    chunk = -(-param.shape[0] // mesh.size(dim))
    return min(mesh.get_local_rank(dim) * chunk, param.shape[0])
