"""The backward stepper: one optimizer step from one group of micro-batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, Tensor, nn

from scale.config.optim import ScheduleConfig, SpikeConfig
from scale.errors import OutOfMemory, ScaleError
from scale.hardware import sum_dtype
from scale.models.modes import evaluating
from scale.protocols import Batch, Group, Loss, Objective, Source, StepReport, Strategy
from scale.train.observe import LayerGradients, Watcher, together
from scale.train.schedule import lr_factor
from scale.train.spike import SpikeFilter


@dataclass(frozen=True)
class StepSettings:
    """How to step. `lr` is the peak shown in reports; `layer_gradients` is every how many steps they are looked at."""

    steps: int
    lr: float
    schedule: ScheduleConfig
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    clip: float = 1.0
    layer_gradients: int = 0


class _NothingToLearn(Exception):
    """Every term of a group counts zero."""


@dataclass
class _Sums:
    """Loss and metrics of a group over all ranks, still on the device: [loss, total, count, total, count, ...]."""

    values: Tensor
    names: list[str]
    passes: int
    segments: list[Tensor]

    def loss(self) -> float:
        return float(self.values[0])

    def metrics(self) -> dict[str, float]:
        values = self.values.tolist()
        return {name: values[1 + 2 * i] / max(values[2 + 2 * i], 1.0) for i, name in enumerate(self.names)}


class BackwardStepper:
    """Implements `scale.protocols.Stepper` by real backward passes. `root` is what the strategy prepared."""

    def __init__(
        self,
        root: nn.Module,
        objective: Objective,
        strategy: Strategy,
        settings: StepSettings,
        event: Callable[[str, str], None] = print,
        split: int = 1,
    ):
        self.root, self.objective, self.strategy, self.settings, self.event = root, objective, strategy, settings, event
        self.spikes = SpikeFilter(settings.spike)
        self.gradients = LayerGradients(strategy.ranks.all_sum, settings.layer_gradients)
        self.watchers: list[Watcher] = [self.gradients]
        self.steps_done = 0
        self.split = split  # micro-batches are this many times smaller than drawn, after running out of memory

    def step(self, source: Source) -> StepReport:
        start = time.perf_counter()
        group = source.draw()
        step = self.steps_done + 1
        try:
            sums = self._with_less_memory(lambda: self._gradients(group), group)
        except _NothingToLearn as error:
            self.steps_done = step
            return self._empty(step, group, start, self.spikes.count(str(error)))
        factor = self.factor(step)
        looking = [watcher for watcher in self.watchers if watcher.due(step)]
        try:
            update = self.strategy.update(
                factor,
                self.settings.clip,
                observe=together(looking),
                veto=lambda norm: self.spikes.judge(
                    sums.loss(), norm
                ),  # read only here: one wait for the device, not two
            )
        except RuntimeError as error:
            if is_out_of_memory(error):  # half a step may be applied: only a checkpoint is safe to go on from
                raise ScaleError(
                    "out of memory in the optimizer step: lower batch.micro or use optim.kind=adamw8bit"
                ) from None
            raise
        self.steps_done = step
        if group.hear is not None and not update.skipped:
            group.hear(sums.segments)
        source.publish(step, self.strategy.full_params)
        return StepReport(
            step=step,
            kind="skipped" if update.skipped else "full",
            loss=sums.loss(),
            grad_norm=update.grad_norm,
            lr=self.settings.lr * factor,
            tokens=group.tokens,
            forward_passes=sums.passes,
            backward_passes=sums.passes,
            forward_tokens=group.tokens,
            backward_tokens=group.tokens,
            seconds=time.perf_counter() - start,
            seq_len=group.seq_len,
            skipped=update.skipped,
            metrics=sums.metrics(),
            sources=group.sources,
            layer_gradients=self.gradients.last if self.gradients in looking and not update.skipped else {},
        )

    def _empty(self, step: int, group: Group, start: float, reason: str | None) -> StepReport:
        """The report of a step whose batch has no token to learn (long prompts can fill one): skipped, nothing computed."""
        return StepReport(
            step=step,
            kind="skipped",
            loss=math.nan,
            grad_norm=math.nan,
            lr=self.settings.lr * self.factor(step),
            tokens=group.tokens,
            forward_passes=0,
            backward_passes=0,
            forward_tokens=0,
            backward_tokens=0,
            seconds=time.perf_counter() - start,
            seq_len=group.seq_len,
            skipped=reason,
            sources=group.sources,
        )

    def score(self, group: Group) -> float:
        """Mean loss of a group over all ranks, by forward passes alone: in evaluation mode, nothing is drawn or changed."""
        batches = group.split(self.split)
        denominators = self._denominators(batches)
        total = torch.zeros((), dtype=sum_dtype(self.strategy.ranks.device), device=self.strategy.ranks.device)
        with evaluating(self.root):
            for batch in batches:
                out: Loss = self.root(self._to_device(batch))
                total += sum_of(term.weight * term.total / denominators[name] for name, term in out.terms.items())
        return float(self.strategy.ranks.all_sum(total))

    def advance(self, steps: int) -> None:
        """Count steps that something else made."""
        self.steps_done += steps

    def factor(self, step: int) -> float:
        """Learning-rate factor of a step, from 1."""
        return lr_factor(self.settings.schedule, step, self.settings.steps)

    def rehearse(self, source: Source) -> None:
        """Forward and backward of every shape to come, without a step: compile and memory errors come before step 1.

        Leaves no trace: random generators and buffers (such as running means) are put back.
        """
        group = source.rehearse()
        if group is None:
            return
        rng, buffers = _rng(self.strategy.ranks.device), [b.clone() for b in self.root.buffers()]
        with suppress(_NothingToLearn):
            self._with_less_memory(lambda: self._gradients(group), group)
        self.strategy.discard()
        _set_rng(self.strategy.ranks.device, rng)
        for buffer, before in zip(self.root.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _gradients(self, group: Group) -> _Sums:
        """Accumulate the gradients of a group.

        The one place where sums become means: each term is divided by its count over all micro-batches and ranks.
        """
        batches = group.split(self.split)
        denominators = self._denominators(batches)
        dtype = sum_dtype(self.strategy.ranks.device)
        total = torch.zeros((), dtype=dtype, device=self.strategy.ranks.device)
        metrics: dict[str, Tensor] = {}
        segments: list[Tensor] = []
        for i, batch in enumerate(batches):
            with self.strategy.accumulate(last=i == len(batches) - 1):
                out: Loss = self.root(self._to_device(batch))
                loss = sum_of(term.weight * term.total / denominators[name] for name, term in out.terms.items())
                self.strategy.backward(loss)
            total += loss.detach()
            if group.hear is not None:
                segments.append(_segments(out))
            for name, term in out.metrics.items():
                pair = torch.stack([term.total.detach().to(dtype), term.count.to(dtype)])
                metrics[name] = metrics.get(name, torch.zeros_like(pair)) + pair
        values = self.strategy.ranks.all_sum(torch.cat([total.view(1), *metrics.values()]))
        return _Sums(values, list(metrics), len(batches), segments)

    def _denominators(self, batches: list[Batch]) -> dict[str, float]:
        """Count of each term over all micro-batches and ranks. Raises _NothingToLearn if all are zero."""
        local = [self.objective.counts(batch) for batch in batches]
        names = list(local[0])
        counts = self.strategy.ranks.all_sum(
            torch.stack([sum_of(c[name] for c in local) for name in names]).to(sum_dtype(self.strategy.ranks.device))
        ).tolist()
        if not any(counts):
            raise _NothingToLearn(f"nothing to learn: {', '.join(names)} count 0 (are all labels masked?)")
        return {name: max(count, 1.0) for name, count in zip(names, counts, strict=True)}

    def _with_less_memory(self, run: Callable[[], Any], group: Group) -> Any:
        """Run; when memory does not suffice, halve the micro-batch (the global batch stays) and run again."""
        while True:
            rng = _rng(self.strategy.ranks.device)
            try:
                return run()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.strategy.ranks.world_size > 1:  # the others wait in collectives that this rank will not join
                    raise OutOfMemory(
                        "out of memory: start again with smaller micro-batches (--split or batch.micro; launchers do it "
                        "by themselves), set compute.recompute=1 or use more GPUs"
                    ) from None
                rows = max(len(next(iter(b.values()))) for b in group.split(self.split))
                if rows <= 1:
                    raise ScaleError(
                        "out of memory with a single row: lower data.seq_len, set compute.recompute=1 or take a smaller model"
                    ) from None
            self.strategy.discard()
            if self.strategy.ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            _set_rng(self.strategy.ranks.device, rng)
            self.split *= 2
            text = f"out of memory with {rows} rows at once: now {-(-rows // 2)} rows, same global batch"
            self.event("out_of_memory", text)

    def _to_device(self, batch: Batch) -> dict[str, Tensor]:
        return {name: tensor.to(self.strategy.ranks.device, non_blocking=True) for name, tensor in batch.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def blank(self, saved: Mapping[str, Size]) -> dict[str, Tensor]:
        """What a prediction left behind, in a run that now goes on without one, stays in the checkpoint."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""

    def state_dict(self) -> dict[str, Any]:
        return {"steps_done": self.steps_done, "split": self.split, "spikes": self.spikes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_done, self.split = state["steps_done"], max(self.split, state["split"])
        self.spikes.load_state_dict(state["spikes"])


def sum_of(tensors: Any) -> Tensor:
    """Sum of an iterable of tensors (Python's `sum` starts with the int 0)."""
    return torch.stack(list(tensors)).sum(0)


def _segments(loss: Loss) -> Tensor:
    if loss.per_segment is None:
        raise ScaleError("selection: the objective does not tell the losses of documents (CausalLM(per_document=True))")
    return loss.per_segment.detach()


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA raises its own class (a RuntimeError); a CPU allocator a RuntimeError that says so; Python a MemoryError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _rng(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_rng(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
