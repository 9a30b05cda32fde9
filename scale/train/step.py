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
from scale.errors import OutOfMemory, ScaleError, UsageError
from scale.models.modes import evaluating
from scale.protocols import Batch, Group, Loss, Objective, Source, StepReport, Strategy
from scale.train.observe import LayerGradients, Watcher, together
from scale.train.schedule import lr_factor, warmup_steps
from scale.train.spike import SpikeFilter
from scale.train.sums import Counts, Gathered, GroupSums, NamedSums, NothingToLearn


@dataclass(frozen=True)
class StepSettings:
    """How to step. `lr` is the peak shown in reports; `layer_gradients` is every how many steps they are looked at (0: never).
    Raises UsageError for what a run of `steps` could not honour."""

    steps: int
    lr: float
    schedule: ScheduleConfig
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    clip: float = 1.0
    layer_gradients: int = 0

    def __post_init__(self) -> None:
        if self.layer_gradients < 0:
            raise UsageError(f"layer_gradients = {self.layer_gradients}: expected 0 (never) or every how many steps")
        if warmup_steps(self.schedule, self.steps) > self.steps:
            raise UsageError(f"schedule.warmup = {self.schedule.warmup}: longer than the run of {self.steps} steps")


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
        self.counts, self.metrics = Counts(strategy.ranks, objective), NamedSums(strategy.ranks, 2)
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
        except NothingToLearn as error:
            self.steps_done = step
            return self._empty(step, group, start, self.spikes.count(f"nothing to learn: {error}"))
        factor = self.factor(step)
        looking = [watcher for watcher in self.watchers if watcher.due(step)]
        try:
            update = self.strategy.update(
                factor,
                self.settings.clip,
                observe=together(looking),
                veto=lambda norm: self.spikes.judge(
                    sums.read()[0], norm
                ),  # only here: one wait for the device, not two
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
        loss, metrics = sums.read()
        return StepReport(
            step=step,
            kind="skipped" if update.skipped else "full",
            loss=loss,
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
            metrics=metrics,
            sources=group.sources,
            layer_gradients=self.gradients.last if self.gradients in looking and not update.skipped else {},
        )

    def _empty(self, step: int, group: Group, start: float, reason: str | None) -> StepReport:
        """The report of a step whose batch has no token to learn (long prompts can fill one): skipped, nothing computed, no
        token trained on."""
        return StepReport(
            step=step,
            kind="skipped",
            loss=math.nan,
            grad_norm=math.nan,
            lr=self.settings.lr * self.factor(step),
            tokens=0,
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
        """Mean loss of a group over all ranks, by forward passes alone: in evaluation mode, nothing is drawn or changed.
        Raises ScaleError for a group without anything to score."""
        batches = group.split(self.split)
        try:
            counted = self.counts.of(batches)
        except NothingToLearn as error:
            raise ScaleError(f"nothing to score: {error}") from None
        gathered = Gathered(counted, self.strategy.ranks.device)
        with evaluating(self.root):
            for batch in batches:
                gathered.add(counted.loss(self.root(self._to_device(batch))), {})
        return GroupSums(gathered.over_ranks(self.metrics), counted, len(batches), []).read()[0]

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
        with suppress(NothingToLearn):
            self._with_less_memory(lambda: self._gradients(group), group).read()
        self.strategy.discard()
        _set_rng(self.strategy.ranks.device, rng)
        for buffer, before in zip(self.root.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _gradients(self, group: Group) -> GroupSums:
        """Accumulate the gradients of a group, each term divided by its count over all micro-batches and ranks."""
        batches = group.split(self.split)
        counted = self.counts.of(batches)
        gathered = Gathered(counted, self.strategy.ranks.device)
        segments: list[Tensor] = []
        for i, batch in enumerate(batches):
            with self.strategy.accumulate(last=i == len(batches) - 1):
                out: Loss = self.root(self._to_device(batch))
                loss = counted.loss(out)
                self.strategy.backward(loss)
            gathered.add(loss, out.metrics)
            if group.hear is not None:
                segments.append(_segments(out))
        return GroupSums(gathered.over_ranks(self.metrics), counted, len(batches), segments)

    def _with_less_memory(self, run: Callable[[], GroupSums], group: Group) -> GroupSums:
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
