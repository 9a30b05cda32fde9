"""Prediction for any torch training loop: `predict.wrap(model, optimizer, ...)`, on one device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from scale.config.predict import PredictConfig
from scale.errors import UsageError
from scale.models.modes import evaluating
from scale.parallel.ranks import Ranks
from scale.predict.stepper import PredictiveStepper
from scale.protocols import Group, Shard, Shards, Source, StepReport
from scale.train.observe import Watcher, together
from scale.train.step import BackwardStepper


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    check: Callable[[], Tensor | float],
    config: PredictConfig | Mapping[str, Any] | None = None,
    schedule: Callable[[int], float] = lambda step: 1.0,
    tokens: int = 1,
    check_tokens: int = 1,
) -> Predictor:
    """A predictor around a loop of one's own.

    steps: optimizer steps of the whole run. check: mean loss of fixed data that are never trained on; called without
    gradients and in evaluation mode. schedule: learning rate of a step (from 1) as a share of the peak; the loop sets the
    optimizer's learning rate itself. tokens, check_tokens: how much a step and a check read, in any unit, for the costs.

    >>> predictor = wrap(model, optimizer, steps=1000, check=check)
    >>> while predictor.steps_done < 1000:
    ...     predictor.step(closure)  # zeroes gradients, computes the loss, calls backward, returns the loss

    config: as the `predict` section of a run, enabled by being here; without selection and guard.tokens.

    Raises UsageError for several processes (the trainer does those) and for a config that does not fit.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UsageError("predict.wrap: one process only; several are for scale.api.Trainer")
    if steps < 1 or tokens < 1 or check_tokens < 1:
        raise UsageError(
            f"predict.wrap: steps = {steps}, tokens = {tokens}, check_tokens = {check_tokens}: 1 or more each"
        )
    mine = {id(param) for param in model.parameters()}
    if not all(id(param) in mine for group in optimizer.param_groups for param in group["params"]):
        raise UsageError("predict.wrap: the optimizer holds parameters that are not the model's")
    if not isinstance(config, PredictConfig):
        config = _checked({"enabled": True, **(config or {})})
    return Predictor(_Loop(model, optimizer, steps, check, schedule, tokens, check_tokens), _fitting(config))


def _checked(section: Mapping[str, Any]) -> PredictConfig:
    """Raises UsageError, one line, for what is no section `predict`."""
    try:
        return PredictConfig.model_validate(section)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))} = {one['input']!r}: {one['msg']}" for one in error.errors())
        raise UsageError(f"predict.wrap: config: {' '.join(told.split())}") from None


def _fitting(config: PredictConfig) -> PredictConfig:
    """The config, enabled if it is silent about that. Raises UsageError for what has no meaning around a loop."""
    if "enabled" in config.model_fields_set and not config.enabled:
        raise UsageError(
            "predict.wrap: enabled = False: to wrap is to enable; leave it out, or step without a predictor"
        )
    if config.selection.kind != "off":
        raise UsageError(
            f"predict.wrap: selection.kind = {config.selection.kind!r}: a closure draws its own documents; only 'off' works"
        )
    if config.guard.tokens:
        raise UsageError(
            f"predict.wrap: guard.tokens = {config.guard.tokens}: a check is one call of your own function; leave it out "
            "and say how much that reads with check_tokens"
        )
    return config.model_copy(update={"enabled": True})


class Predictor:
    """Makes steps by a closure, and counts steps that it could save without calling it."""

    def __init__(self, loop: _Loop, config: PredictConfig):
        self._loop = loop
        self._stepper = PredictiveStepper(cast(BackwardStepper, loop), config)

    @property
    def steps_done(self) -> int:
        """Real and predicted steps so far."""
        return self._loop.steps_done

    @property
    def ledger(self) -> dict[str, int]:
        """What was spent and saved: see `scale.predict.ledger`."""
        return self._stepper.ledger.counts()

    def step(self, closure: Callable[[], Tensor]) -> StepReport:
        """One step of the run: real, then `closure` is called once, or predicted, then it is not. Raises UsageError after the
        last one."""
        if self.steps_done >= self._loop.settings.steps:
            raise UsageError(f"predict.wrap: all {self._loop.settings.steps} steps are done")
        return self._stepper.step(cast(Source, _Closure(closure, self._loop.check_tokens)))

    def state_dict(self) -> dict[str, Any]:
        """JSON under `state`, tensors by name under `tensors`. The model's and the optimizer's states are the loop's."""
        return {"state": self._stepper.state_dict(), "tensors": self._stepper.tensors()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on exactly, after model and optimizer were restored."""
        self._stepper.load_state_dict(saved["state"])
        self._stepper.restore(saved["tensors"])


class _Closure:
    """A closure as a source: the only thing drawn from it is the check, which the loop keeps itself."""

    def __init__(self, closure: Callable[[], Tensor], check_tokens: int):
        self.closure, self.check_tokens = closure, check_tokens

    def draw(self) -> Group:
        return Group([{"check": torch.zeros(1)}], self.check_tokens)

    def publish(self, version: int, params: Callable[[], Any]) -> None:
        """No rollout engine."""


class _Here:
    """The part of a strategy that prediction needs: weights of one process, which are their own masters."""

    def __init__(self, model: nn.Module):
        self.params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        odd = [name for name, param in self.params.items() if param.dtype is not torch.float32]
        if odd:
            raise UsageError(f"predict.wrap: {odd[0]} is {self.params[odd[0]].dtype}: masters in float32 are needed")
        self.ranks = Ranks(device=next(iter(self.params.values())).device)

    @contextmanager
    def edit_masters(self) -> Iterator[Shards]:
        with torch.no_grad():
            yield self.shards()

    def shards(self) -> Shards:
        return {name: Shard(name, p.data, p.grad, tuple(p.shape)) for name, p in self.params.items()}


@dataclass
class _Loop:
    """Stands where `BackwardStepper` stands in a trainer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    check: Callable[[], Tensor | float]
    factor: Callable[[int], float]
    tokens: int
    check_tokens: int

    def __post_init__(self) -> None:
        self.strategy = _Here(self.model)
        self.settings = SimpleNamespace(steps=self.steps, lr=self.optimizer.param_groups[0]["lr"])
        self.watchers: list[Watcher] = []
        self.steps_done = 0

    def event(self, kind: str, text: str) -> None:
        print(text, flush=True)

    def advance(self, steps: int) -> None:
        self.steps_done += steps

    def score(self, group: Group) -> float:
        with evaluating(self.model):
            return float(self.check())

    def step(self, source: _Closure) -> StepReport:
        start = time.perf_counter()
        loss = float(source.closure().detach())
        self.steps_done += 1
        step = self.steps_done
        if look := together([watcher for watcher in self.watchers if watcher.due(step)]):
            look(self.strategy.shards())
        grads = [p.grad for p in self.strategy.params.values() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(grads))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        return StepReport(
            step=step,
            kind="full" if finite else "skipped",
            loss=loss,
            grad_norm=norm,
            lr=self.optimizer.param_groups[0]["lr"],
            tokens=self.tokens,
            forward_passes=1,
            backward_passes=1,
            forward_tokens=self.tokens,
            backward_tokens=self.tokens,
            seconds=time.perf_counter() - start,
            skipped=None if finite else "non-finite loss or gradient",
        )

    def state_dict(self) -> dict[str, Any]:
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_done = state["steps_done"]
