"""FSDP2: weights, gradients and moments sharded by rows over all ranks, or within groups of them (HSDP)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Size, Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from scale.config.optim import OptimConfig
from scale.config.run import FsdpConfig
from scale.errors import OutOfMemory, UsageError
from scale.models.build import materialise
from scale.objectives.root import Root
from scale.parallel import state
from scale.parallel.compiling import compile_module
from scale.parallel.muon import first_row
from scale.parallel.optimizer import OptimizerSet
from scale.parallel.ranks import FIRST_STEP_SECONDS, Ranks
from scale.protocols import Observe, Shard, Shards, Update, Veto, Weights


class Fsdp:
    """Implements `scale.protocols.Strategy` with torch's fully_shard; bf16 means bf16 copies of sharded fp32 masters.

    Each decoder layer is gathered by itself, the rest with the root. Of persistent buffers each rank has its own.
    Raises UsageError for options that do not fit the ranks or the device.
    """

    def __init__(self, ranks: Ranks, config: FsdpConfig, precision: str = "fp32", compile: str = "off"):
        shard = ranks.world_size if config.shard == "all" else config.shard
        if ranks.world_size % shard:
            raise UsageError(f"compute.fsdp.shard = {shard}: does not divide the {ranks.world_size} ranks")
        if config.offload and ranks.device.type == "cpu":
            raise UsageError("compute.fsdp.offload = true: needs an accelerator, and the device is the CPU")
        self.ranks, self.config, self.precision, self.compile = ranks, config, precision, compile
        self.copies = ranks.world_size // shard
        self.place = torch.device("cpu") if config.offload else ranks.device
        """Where shards live."""
        self._mesh: DeviceMesh | None = None
        self._used = self._broken_off = False
        """Whether there was a pass since the last `discard`, and whether it ended in an exception."""

    def prepare(self, root: nn.Module, optim: OptimConfig | None, weights: Weights | None) -> nn.Module:
        assert isinstance(root, Root)
        _refuse(root, optim, self.config)
        if optim is None:
            root.requires_grad_(False)
        self._shard(root)
        if weights is not None:
            materialise(root.model, weights, self.place, _put_rows)
        for module in root.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.ranks.device)
        if optim is None:
            return root.eval()
        self.root, self.model = root, root.model
        self.optimizer = OptimizerSet(self.model, optim)
        self.params = cast("list[DTensor]", list(self.optimizer.names))
        return root.train()

    def _shard(self, root: Root) -> None:
        """compile(layer), then fully_shard(layer), then the root; recompute is inside both, in the layer's `forward`."""
        blocks = decoder_layers(root.model)
        for block in blocks:
            compile_module(block, self.compile)
            self._fully_shard(block, reshard_after_forward=self.config.reshard)
        # inputs of the root may be more than activations (rewards, log probabilities): layers cast their own
        self._fully_shard(root, cast_inputs=not blocks)
        for module in _sharded(root):  # a plain sum: the loss is normalised over all ranks already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _fully_shard(
        self, module: nn.Module, cast_inputs: bool = True, reshard_after_forward: bool | None = None
    ) -> None:
        for param in module.parameters():
            if not isinstance(param, DTensor) and not param.is_meta:  # loaded: onto the device one layer at a time
                param.data = param.data.to(self.ranks.device)
        low = self.precision != "fp32"
        fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if low else None,
                reduce_dtype=torch.float32 if low else None,
                cast_forward_inputs=cast_inputs,
            ),
            offload_policy=CPUOffloadPolicy() if self.config.offload else OffloadPolicy(),
        )

    @property
    def mesh(self) -> DeviceMesh:
        """All ranks in one row, or copies x shards."""
        if self._mesh is None:
            self.ranks.need_group()
            kind, world_size = self.ranks.device.type, self.ranks.world_size
            if self.copies == 1:
                self._mesh = init_device_mesh(kind, (world_size,), mesh_dim_names=("shard",))
            else:
                shape = (self.copies, world_size // self.copies)
                self._mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
            self.ranks.set_timeout(FIRST_STEP_SECONDS)
        return self._mesh

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self._used = self._broken_off = True
        if self.config.reduce == "step":
            root = cast(FSDPModule, self.root)
            root.set_requires_gradient_sync(last)
            root.set_is_last_backward(last)
        yield
        self._broken_off = False

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, lr_factor: float, max_norm: float, observe: Observe | None, veto: Veto | None) -> Update:
        self._reshard()
        grads = [grad for grad in map(_local_grad, self.params) if grad is not None]
        grad_norm = self._norm(grads)
        reason = veto(grad_norm) if veto is not None else None
        if reason is None:
            if grads and 0 < max_norm < grad_norm:
                torch._foreach_mul_(grads, max_norm / (grad_norm + 1e-6))  # as torch's clip_grad_norm_
            if observe is not None:
                observe(self._shards())
            self.optimizer.step(lr_factor)
        self.discard()
        return Update(grad_norm, reason)

    def _norm(self, grads: list[Tensor]) -> float:
        """Global 2-norm, the same on every rank: each element counts once, however many ranks hold a copy of it."""
        square = torch.zeros((), dtype=torch.float64, device=self.place)
        if grads:
            square += torch.stack(torch._foreach_norm(grads)).double().square().sum()
        return math.sqrt(float(self.ranks.all_sum(square)) / self.copies)

    def discard(self) -> None:
        """Raises OutOfMemory after a pass that broke off, where torch cannot reset its hooks: memory is what ends passes."""
        self.optimizer.zero_grad()
        if self._used:
            reset: Callable[[], None] | None = getattr(self.root, "reset_iter_state", None)  # from torch 2.13
            if reset is not None:
                reset()
            elif self._broken_off:
                raise OutOfMemory(
                    f"out of memory, and torch {torch.__version__} cannot take up FSDP again after it (2.13 can): start "
                    "again with smaller micro-batches (--split or batch.micro; launchers do it by themselves)"
                )
            _drop_unreduced(self.root)
        self._used = self._broken_off = False

    @contextmanager
    def edit_masters(self) -> Iterator[Shards]:
        self._reshard()
        try:
            with torch.no_grad():
                yield self._shards()
        finally:
            self._reshard()

    def _reshard(self) -> None:
        """Free gathered weights, which may be older than the shards. After a forward pass the root keeps its own."""
        for module in _sharded(self.root):
            module.reshard()

    def _shards(self) -> Shards:
        return {
            name: Shard(
                name,
                cast(DTensor, param).to_local(),
                _local_grad(param),
                tuple(param.shape),
                offset=first_row(cast(DTensor, param)),
                copies=self.copies,
            )
            for param, name in self.optimizer.names.items()
        }

    def full_params(self) -> Iterator[tuple[str, Tensor]]:
        self._reshard()
        for name, param in list(self.model.named_parameters()):
            yield name, cast(DTensor, param.detach()).full_tensor()

    def tensors(self) -> dict[str, Tensor]:
        self._reshard()
        return state.canonical(self.model, self.optimizer)

    def blank(self, saved: Mapping[str, Size]) -> dict[str, Tensor]:
        self._reshard()
        return state.blank(self.model, self.optimizer, saved)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights were read in place, into shards that the next forward pass gathers."""
        self.optimizer.restore(state.moments(tensors))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: Hugging Face's layers, else the children of its longest ModuleList."""
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if layers:
        return layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def _refuse(root: Root, optim: OptimConfig | None, config: FsdpConfig) -> None:
    if optim is not None and optim.kind == "adamw8bit":
        raise UsageError("optim.kind = 'adamw8bit': its 8-bit moments cannot be sharded by fsdp (use adamw or muon)")
    if optim is not None and optim.kind == "muon" and config.offload:
        raise UsageError(
            "optim.kind = 'muon': with compute.fsdp.offload=true its matrix products would run on the CPU "
            "(use adamw, or compute.fsdp.offload=false)"
        )
    for name, param in root.model.named_parameters():
        if param.ndim == 0:
            raise UsageError(f"compute.strategy = 'fsdp': parameter {name} is a single number and cannot be sharded")


def _sharded(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _local_grad(param: Tensor) -> Tensor | None:
    return None if param.grad is None else cast(DTensor, param.grad).to_local()


def _put_rows(param: Tensor, full: Tensor) -> None:
    local, first = cast(DTensor, param).to_local(), first_row(cast(DTensor, param))
    local.copy_(full[first : first + len(local)])


def _drop_unreduced(root: nn.Module) -> None:
    """Forget whole gradients that were not exchanged yet (reduce: step); FSDP has no public way to."""
    for module in _sharded(root):
        for group in _param_groups(module._get_fsdp_state()):
            for held in group.fsdp_params:
                held.unsharded_accumulated_grad = None
                unsharded: Any = getattr(held, "_unsharded_param", None)
                if unsharded is not None:
                    unsharded.grad = None


def _param_groups(module_state: Any) -> list[Any]:
    """Torch 2.11 has one group or none; later ones have a list."""
    if hasattr(module_state, "_fsdp_param_groups"):
        return list(module_state._fsdp_param_groups)
    return [] if module_state._fsdp_param_group is None else [module_state._fsdp_param_group]
