"""DeepSpeed ZeRO: gradients and moments (stage 2), or weights too (stage 3), cut over the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Size, Tensor, nn

from scale.config.optim import OptimConfig
from scale.config.run import DeepSpeedConfig
from scale.errors import UsageError
from scale.objectives.root import Root
from scale.parallel.optimizer import adamw_groups
from scale.parallel.ranks import FIRST_STEP_SECONDS, Ranks
from scale.parallel.zero_config import deepspeed_json
from scale.parallel.zero_place import place_parts, place_whole, start
from scale.parallel.zero_root import Engined, TensorsOnly
from scale.parallel.zero_shards import Layout, Stage2, Stage3
from scale.parallel.zero_state import ZeroState
from scale.protocols import Observe, Shard, Shards, Update, Veto, Weights


class DeepSpeed:
    """Implements `scale.protocols.Strategy` with DeepSpeed's engine; bf16 means bf16 weights and fp32 masters.

    Raises UsageError for options that do not fit, and for a `config.config` that contradicts them.
    """

    def __init__(self, ranks: Ranks, config: DeepSpeedConfig, precision: str = "fp32"):
        if precision not in ("fp32", "bf16"):
            raise UsageError(f"compute.precision = {precision!r}: strategy deepspeed computes in bf16 or fp32")
        self.json = deepspeed_json(config, precision)
        self.ranks, self.config, self.precision = ranks, config, precision
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def prepare(self, root: nn.Module, optim: OptimConfig | None, weights: Weights | None) -> nn.Module:
        assert isinstance(root, Root)
        check_optimizer(optim)
        deepspeed = start(self.ranks)
        if optim is None:
            return self._frozen(deepspeed, root, weights)
        model = root.model
        names = {param: name for name, param in model.named_parameters()}
        self.shapes = {name: param.shape for param, name in names.items() if param.requires_grad}
        groups = [group | {"params": [names[p] for p in group["params"]]} for group in adamw_groups(model, optim)]
        before = {} if self.dtype == torch.float32 else {name: param.data for param, name in names.items()}
        self._place(model, weights)
        self.engine = self._start_engine(deepspeed, root, _adamw(model, groups, optim))
        self._look_inside(model)
        if self.dtype != torch.float32:  # DeepSpeed makes its masters from weights already rounded to bf16
            with self.edit_masters() as shards:
                for name, shard in shards.items():
                    full = before[name] if weights is None else weights(name, self.shapes[name])
                    shard.param.copy_(full.reshape(-1)[shard.offset : shard.offset + shard.param.numel()])
        return Engined(self.engine).train()

    def _place(self, model: nn.Module, weights: Weights | None) -> None:
        if self.config.stage == 3:
            place_parts(model, weights, self.ranks, self.json, self.dtype)
        else:
            place_whole(model, weights, self.ranks.device)

    def _start_engine(self, deepspeed: Any, root: Root, optimizer: torch.optim.Optimizer | None) -> Any:
        from pydantic import ValidationError

        try:
            engine, *_ = deepspeed.initialize(
                model=TensorsOnly(root), optimizer=optimizer, config=self.json, dist_init_required=False
            )
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UsageError(f"{self.config.config}: DeepSpeed refuses {where}: {first['msg']}") from None
        self.ranks.set_timeout(FIRST_STEP_SECONDS)
        return engine

    def _look_inside(self, model: nn.Module) -> None:
        zero = self.engine.optimizer
        names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
        self.model = model
        self.layout: Layout = (Stage2 if self.config.stage == 2 else Stage3)(zero, names)
        self.state = ZeroState(self.ranks, model, self.shapes, self.layout.fragments, zero.optimizer)

    def _frozen(self, deepspeed: Any, root: Root, weights: Weights | None) -> nn.Module:
        """A reference that is never trained: cut like the trained model in stage 3, else whole."""
        root.requires_grad_(False)
        self._place(root.model, weights)
        if self.config.stage == 3:
            return Engined(self._start_engine(deepspeed, root, None)).eval()
        for param in root.parameters():
            param.data = param.data.to(self.dtype)
        return root.eval()

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)  # ZeRO reduces each time, or it would hold whole gradients
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)

    def update(self, lr_factor: float, max_norm: float, observe: Observe | None, veto: Veto | None) -> Update:
        grads = self.layout.gradients()
        grad_norm = self._norm(grads)
        reason = veto(grad_norm) if veto is not None else None
        if reason is None:
            if 0 < max_norm < grad_norm:
                torch._foreach_mul_(list(grads.values()), max_norm / (grad_norm + 1e-6))  # as torch's clip_grad_norm_
            if observe is not None:
                observe(self._shards(grads))
            for group in self.engine.optimizer.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
            self.engine.step()
            if not self.engine.was_step_applied():
                reason = f"DeepSpeed applies no step with a gradient norm of {grad_norm:g}"
        self.discard()
        return Update(grad_norm, reason)

    def _norm(self, grads: Mapping[str, Tensor]) -> float:
        """Global 2-norm, the same on every rank."""
        norms = torch.stack(torch._foreach_norm(list(grads.values())))
        square = norms.double().square().sum().to(self.ranks.device)
        return math.sqrt(float(self.ranks.all_sum(square)))

    def discard(self) -> None:
        self.layout.drop()

    @contextmanager
    def edit_masters(self) -> Iterator[Shards]:
        """Parts of flattened parameters; their gradients are seen by `observe` only."""
        try:
            with torch.no_grad():
                yield self._shards({})
        finally:
            self.layout.publish()

    def _shards(self, grads: Mapping[str, Tensor]) -> Shards:
        return {
            name: Shard(name, part.master, grads.get(name), tuple(self.shapes[name]), part.offset, flat=True)
            for name, part in self.layout.fragments().items()
        }

    def full_params(self) -> Iterator[tuple[str, Tensor]]:
        """In fp32: the masters of what is trained. Collective, parameter by parameter."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        fragments = self.layout.fragments()
        for name, param in list(self.model.named_parameters()):
            if name in fragments:
                part = fragments[name]
                full = self.state.whole(part, part.flat, self.shapes[name])
                assert full is not None
                yield name, full
            else:
                with GatheredParameters(param, enabled=self.config.stage == 3):
                    full = param.detach().to(torch.float32, copy=True)
                yield name, full

    def tensors(self) -> dict[str, Tensor]:
        return self.state.tensors()

    def blank(self, saved: Mapping[str, Size]) -> dict[str, Tensor]:
        return self.state.blank(saved)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.state.restore(tensors)
        self.layout.publish()


def check_optimizer(optim: OptimConfig | None) -> None:
    """Raises UsageError for an optimizer that flat parts of parameters cannot have."""
    if optim is not None and optim.kind != "adamw":
        raise UsageError(
            f"optim.kind = {optim.kind!r}: strategy deepspeed cuts parameters into flat parts, which hold no matrices or "
            "whole blocks (use adamw, or strategy fsdp for muon)"
        )


def _adamw(model: nn.Module, groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    params = dict(model.named_parameters())
    named = [group | {"params": [params[name] for name in group["params"]], "peak_lr": optim.lr} for group in groups]
    return torch.optim.AdamW(named, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
