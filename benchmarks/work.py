"""What the loops under comparison are given, and the clock that they are timed by."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from scale.api import PretrainRun, build_trainer
from scale.errors import UsageError
from scale.protocols import Group
from scale.train.schedule import lr_factor


@dataclass
class Run:
    """What a loop did: the loss of every step, the seconds of the steps on the clock, and of each where it was timed."""

    losses: list[float]
    seconds: float
    steps: list[float] = field(default_factory=list)


@dataclass
class Work:
    """What every provider is given. The clock runs from the start of step `warm_up` to the start of the last step."""

    config: PretrainRun
    groups: list[Group]
    weights: dict[str, Tensor]
    hf_config: Any
    device: torch.device
    precision: str
    warm_up: int
    compile: str = "off"

    @property
    def timed_tokens(self) -> int:
        """Tokens of the steps on the clock, padding left out."""
        return sum(group.tokens for group in self.groups[self.warm_up : -1])

    def spoiled(self) -> Work:
        """The same with the batches in reverse: other data."""
        return replace(self, groups=self.groups[::-1])

    def clock(self) -> Clock:
        """What a loop tells of its steps."""
        return Clock(self)

    def model(self) -> nn.Module:
        """A fresh model with the common initial weights, in training mode."""
        model = AutoModelForCausalLM.from_config(self.hf_config, dtype=torch.float32)
        model.load_state_dict(self.weights)
        return model.to(self.device).train()

    def optimizer(self, model: nn.Module) -> tuple[AdamW, LambdaLR]:
        """AdamW (fused: the fastest in torch) that decays matrices but no embedding, and the run's schedule."""
        embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        decayed = [p for p in model.parameters() if p.ndim >= 2 and p not in embeddings]
        plain = [p for p in model.parameters() if p.ndim < 2 or p in embeddings]
        config = self.config.optim
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        steps = self.config.train.steps or 0
        return optimizer, LambdaLR(optimizer, lambda done: lr_factor(self.config.schedule, done + 1, steps))


class Clock:
    """Told about the start of every step; reads the time at the start and the end of the stretch that counts."""

    def __init__(self, work: Work):
        self.device = work.device
        self.marks = {work.warm_up: 0.0, len(work.groups) - 1: 0.0}
        self.begun = 0

    def step_begins(self) -> None:
        if self.begun in self.marks:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.marks[self.begun] = time.perf_counter()
        self.begun += 1

    def run(self, losses: list[Any]) -> Run:
        """The finished run."""
        start, end = self.marks.values()
        return Run([float(loss) for loss in losses], end - start)


def with_steps(config: PretrainRun, steps: int, precision: str | None = None) -> PretrainRun:
    """The config of a run of that many steps."""
    compute = config.compute.model_copy(update={"precision": precision} if precision else {})
    train = config.train.model_copy(update={"steps": steps, "tokens": None, "epochs": None})
    return config.model_copy(update={"train": train, "compute": compute})


def prepare_work(config: PretrainRun, warm_up: int) -> Work:
    """Draw the batches and the initial weights that a run of this config would use."""
    if torch.cuda.device_count() > 1:
        raise UsageError(
            f"{torch.cuda.device_count()} GPUs are visible and Hugging Face Trainer would use them all: "
            "set CUDA_VISIBLE_DEVICES=0"
        )
    unread = config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})})
    trainer = build_trainer(unread)
    model: Any = trainer.model
    strategy: Any = trainer.strategy
    return Work(
        config,
        groups=[trainer.source.draw() for _ in range(config.train.steps or 0)],
        weights={name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()},
        hf_config=model.config,
        device=strategy.device,
        precision=strategy.precision,
        warm_up=warm_up,
    )
