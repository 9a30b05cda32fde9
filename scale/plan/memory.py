"""One training step without memory: the real strategy, model and optimizer on fake tensors, watched by a memory tracker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.fsdp import FSDPModule

from scale.parallel.optimizer import OptimizerSet
from scale.protocols import Batch
from scale.train.sums import sum_of

PARTS = ("weights", "gradients", "optimizer", "prediction", "activations", "gathered weights", "gradient exchange",
         "working memory")  # fmt: skip
"""What one GPU holds. The first three live from step to step; prediction is what predictive training keeps beside them;
gathered weights are what other ranks own; gradient exchange is whole gradients on their way into shards; working memory is
what backward and optimizer hold for a moment."""
HELD = PARTS[:3]

_PART_OF: dict[Any, str] = {
    _MemRefType.PARAM: "weights", _MemRefType.BUFFER: "weights", _MemRefType.GRAD: "gradients",
    _MemRefType.OPT: "optimizer", _MemRefType.ACT: "activations", _MemRefType.OTH: "activations",
    _MemRefType.TEMP: "working memory",
    _FSDPRefType.SHARDED_PARAM: "weights", _FSDPRefType.BUFFER: "weights", _FSDPRefType.SHARDED_GRAD: "gradients",
    _FSDPRefType.OPT: "optimizer", _FSDPRefType.ACT: "activations", _FSDPRefType.INP: "activations",
    _FSDPRefType.UNSHARDED_PARAM: "gathered weights", _FSDPRefType.ALL_GATHER: "gathered weights",
    _FSDPRefType.UNSHARDED_GRAD: "gradient exchange", _FSDPRefType.REDUCE_SCATTER: "gradient exchange",
    _FSDPRefType.TEMP: "working memory",
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. `held`: weights, gradients and optimizer in full; `at_peak`: every part at the moment of a step at
    which their sum is highest (gradients may not be complete then); `host`: what lives in CPU memory instead."""

    held: dict[str, int]
    at_peak: dict[str, int]
    method: str
    host: int = 0

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())


class _Peak(MemTracker):
    """Follows the sum of the parts that are on the GPU, and reads torch's own categories as ours."""

    on_gpu: tuple[str, ...] = PARTS
    optimizer_states = 0
    highest = -1
    at_highest: dict[str, int] = {}

    def parts(self) -> dict[str, int]:
        """Bytes of each part now. What an optimizer holds beside its states is working memory."""
        sums = dict.fromkeys(PARTS, 0)
        for kind, size in self._curr_mem_snap.get(torch.device("cpu"), {}).items():
            if kind in _PART_OF:
                sums[_PART_OF[kind]] += size
        if self.optimizer_states:
            sums["working memory"] += sums["optimizer"] - self.optimizer_states
            sums["optimizer"] = self.optimizer_states
        return sums

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        """As torch's, which puts hooks also on frozen parameters: those have no gradient to be told of, and refuse."""
        sizes = super()._track_module_params_and_buffers(module, install_grad_hooks=False)
        if install_grad_hooks:
            for param in module.parameters():
                if param.requires_grad and param not in self._param_to_grad_hook_handles:
                    self._param_to_grad_hook_handles[param] = (
                        param.register_hook(self._found_gradient),
                        param.register_post_accumulate_grad_hook(lambda param: self._found_gradient(param.grad)),
                    )
        return sizes

    def _found_gradient(self, gradient: Any) -> None:
        self._update_and_maybe_create_winfos(gradient, _MemRefType.GRAD)

    def _update_peak_stats(self, peak_state: Any) -> None:  # called by the tracker after every operation
        parts = self.parts()
        total = sum(parts[name] for name in self.on_gpu)
        if total > self.highest:
            self.highest, self.at_highest = total, parts


class _Whole(_Peak):
    pass


class _Sharded(_Peak, FSDPMemTracker):
    pass


def trace_step(root: nn.Module, strategy: Any, batch: Batch, micros: int, clip: float, offload: bool = False) -> Memory:
    """Memory of one optimizer step after the first one, on rank 0, of what `strategy.prepare` made on fake tensors.

    `micros`: micro-batches traced; two show what any larger number would (gradients are there while the second runs).
    With `offload` weights, gradients and optimizer count as CPU memory.
    """
    optimizer: OptimizerSet = strategy.optimizer
    for param in optimizer.names:  # the first step makes the moments
        param.grad = torch.zeros_like(param)
    strategy.update(1.0, clip, None, None)
    with _tracker(root, optimizer, batch) as tracker:
        before = tracker.parts()
        tracker.optimizer_states = before["optimizer"]
        tracker.on_gpu = tuple(name for name in PARTS if not (offload and name in HELD))
        for i in range(micros):
            _micro_batch(root, strategy, batch, last=i == micros - 1)
            tracker.reset_mod_stats()  # or a module that runs a second time is refused
        held = {name: tracker.parts()[name] for name in HELD}
        tracker._in_opt = True
        strategy.update(1.0, clip, None, None)
        tracker._in_opt = False
    at_peak = {name: size if name in tracker.on_gpu else 0 for name, size in tracker.at_highest.items()}
    return Memory(held, at_peak, "traced", sum(held.values()) if offload else 0)


def _micro_batch(root: nn.Module, strategy: Any, batch: Batch, last: bool) -> None:
    with strategy.accumulate(last=last):
        out = root(batch)
        strategy.backward(sum_of(term.weight * term.total / 2.0 for term in out.terms.values()))


@contextmanager
def _tracker(root: nn.Module, optimizer: OptimizerSet, batch: Batch) -> Iterator[_Peak]:
    """Torch's tracker for sharded or for whole modules, which knows of weights, moments and inputs from the start."""
    sharded = any(isinstance(module, FSDPModule) for module in root.modules())
    tracker: Any = _Sharded(root) if sharded else _Whole()
    if sharded:
        tracker.track_inputs(tuple(batch.values()))
    else:
        tracker.track_external(root, *batch.values())
    with tracker:
        for one in optimizer.optimizers:
            tracker._track_optimizer_states(_FSDPRefType.OPT if sharded else _MemRefType.OPT, one)
        yield tracker


def fake_batch(rows: int, seq_len: int) -> Batch:
    """A micro-batch of `rows` x `seq_len` tokens, as the data stream gives them."""
    names = ("input_ids", "targets", "position_ids", "segment_ids")
    return {name: torch.zeros(rows, seq_len, dtype=torch.long) for name in names}
