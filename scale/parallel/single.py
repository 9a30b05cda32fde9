"""One device: the weights are their own masters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Size, Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scale.config.optim import OptimConfig
from scale.models.build import materialise
from scale.objectives.root import Root
from scale.parallel import state
from scale.parallel.compiling import compile_module
from scale.parallel.optimizer import OptimizerSet
from scale.parallel.ranks import Ranks
from scale.protocols import Observe, Shard, Shards, Update, Veto, Weights


class Single:
    """Implements `scale.protocols.Strategy` on one device; bf16 means autocast around fp32 weights."""

    def __init__(self, device: str | torch.device = "cpu", precision: str = "fp32", compile: str = "off"):
        self.ranks = Ranks(device=device)
        self.device = self.ranks.device
        self.precision, self.compile = precision, compile

    def prepare(self, root: nn.Module, optim: OptimConfig | None, weights: Weights | None) -> nn.Module:
        assert isinstance(root, Root)
        if weights is not None:
            materialise(root.model, weights, self.device)
        else:
            root.model.to(self.device)
        compile_module(root.called(), self.compile)
        if self.precision != "fp32":
            root.forward = torch.autocast(self.device.type, torch.bfloat16)(root.forward)  # type: ignore[method-assign]
        if optim is None:
            root.requires_grad_(False)
            return root.eval()
        self.model = root.model
        self.optimizer = OptimizerSet(self.model, optim)
        self.params = list(self.optimizer.names)
        return root.train()

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, lr_factor: float, max_norm: float, observe: Observe | None, veto: Veto | None) -> Update:
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = get_total_norm(grads)
        grad_norm = float(norm)
        reason = veto(grad_norm) if veto is not None else None
        if reason is None:
            if max_norm > 0:
                clip_grads_with_norm_(self.params, max_norm, norm)
            if observe is not None:
                observe(self._shards())
            self.optimizer.step(lr_factor)
        self.discard()
        return Update(grad_norm, reason)

    def discard(self) -> None:
        self.optimizer.zero_grad()

    @contextmanager
    def edit_masters(self) -> Iterator[Shards]:
        with torch.no_grad():
            yield self._shards()

    def _shards(self) -> Shards:
        return {
            name: Shard(name, param.data, param.grad, tuple(param.shape))
            for param, name in self.optimizer.names.items()
        }

    def full_params(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in self.model.named_parameters():
            yield name, param.detach()

    def tensors(self) -> dict[str, Tensor]:
        return state.canonical(self.model, self.optimizer)

    def blank(self, saved: Mapping[str, Size]) -> dict[str, Tensor]:
        return state.blank(self.model, self.optimizer, saved)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights were read in place; hand the moments to the optimizer."""
        self.optimizer.restore(state.moments(tensors))
