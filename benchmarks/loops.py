"""The training loops that benchmarks compare, each as a function (work, scratch folder) -> losses and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, TrainingArguments

from scale.api import PretrainRun, build_trainer
from scale.data.rows import IGNORE
from scale.errors import UsageError
from scale.protocols import Group, StepReport
from scale.train.schedule import lr_factor


@dataclass
class Run:
    """What a loop did: the loss of every step, and the seconds of the steps on the clock."""

    losses: list[float]
    seconds: float


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

    @property
    def timed_tokens(self) -> int:
        """Tokens of the steps on the clock, padding left out."""
        return sum(group.tokens for group in self.groups[self.warm_up : -1])

    def spoiled(self) -> Work:
        """The same with the batches in reverse: other data."""
        return replace(self, groups=self.groups[::-1])

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
    return Work(
        config,
        groups=[trainer.source.draw() for _ in range(config.train.steps or 0)],
        weights={name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()},
        hf_config=model.config,
        device=torch.device(trainer.strategy.device),
        precision=trainer.strategy.precision,  # type: ignore[attr-defined]
        warm_up=warm_up,
    )


def bare(work: Work, folder: Path) -> Run:
    """What one would write by hand; never waits for the device."""
    model, clock, losses = work.model(), Clock(work), []
    optimizer, schedule = work.optimizer(model)
    for group in work.groups:
        clock.step_begins()
        count = sum(int((batch["targets"] != IGNORE).sum()) for batch in group.batches)
        total = torch.zeros((), device=work.device)
        for batch in group.batches:
            on_device = {name: tensor.to(work.device, non_blocking=True) for name, tensor in batch.items()}
            with torch.autocast(work.device.type, torch.bfloat16, enabled=work.precision == "bf16"):
                out = model(input_ids=on_device["input_ids"], position_ids=on_device["position_ids"], use_cache=False)
                logits_TV = out.logits.float().flatten(0, 1)
                loss = F.cross_entropy(logits_TV, on_device["targets"].flatten(), ignore_index=IGNORE, reduction="sum")
                loss = loss / count
            loss.backward()
            total += loss.detach()
        if work.config.optim.clip > 0:
            clip_grad_norm_(model.parameters(), work.config.optim.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return clock.run(losses)


class _StepBegins(transformers.TrainerCallback):
    """Starts of steps, as Trainer announces them."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.step_begins()


class _HFTrainer(transformers.Trainer):
    """Keeps the loss of each micro-batch, which Trainer has normalised by the tokens of the whole step."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.micro_losses.append(loss)
        return loss


def huggingface(work: Work, folder: Path) -> Run:
    """transformers.Trainer, told what it cannot know.

    Targets are shifted already and go in as `shift_labels`: shifting `labels` itself, the model would lose the last
    position of every row. `labels` must be there too, or no loss and no token count is made. Optimizer and schedule
    are passed in, because Trainer's own would decay the embeddings and start its warm-up at zero.
    """
    model, clock = work.model(), Clock(work)
    micro = [
        {
            "input_ids": batch["input_ids"],
            "position_ids": batch["position_ids"],
            "labels": batch["targets"],
            "shift_labels": batch["targets"],
        }
        for group in work.groups
        for batch in group.batches
    ]
    accumulated = len(work.groups[0].batches)
    trainer = _HFTrainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=len(work.groups),
            per_device_train_batch_size=1,  # an item of the data set is a whole micro-batch
            gradient_accumulation_steps=accumulated,
            train_sampling_strategy="sequential",
            max_grad_norm=work.config.optim.clip,
            bf16=work.precision == "bf16",
            use_cpu=work.device.type == "cpu",
            dataloader_pin_memory=work.device.type == "cuda",
            remove_unused_columns=False,
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it waits for the device in every step
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=lambda items: items[0],
        train_dataset=micro,  # type: ignore[arg-type]
        optimizers=work.optimizer(model),
        callbacks=[_StepBegins(clock)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.micro_losses = []
    trainer.train()
    losses = torch.stack(trainer.micro_losses).view(len(work.groups), accumulated).sum(1)
    return clock.run(losses.tolist())


class _Watched:
    """A source that tells the clock when a step begins and keeps the losses it hears of."""

    def __init__(self, draw: Callable[[], Group], clock: Clock):
        self.drawn, self.clock, self.losses = draw, clock, list[float]()

    def draw(self) -> Group:
        self.clock.step_begins()
        return self.drawn()

    def rehearse(self) -> None:
        """Nothing is tried before the first step."""

    def observe(self, report: StepReport) -> None:
        self.losses.append(report.loss)

    def publish(self, version: int, params: object) -> None:
        """No rollout engine listens."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Never resumed."""


def scale(work: Work, folder: Path) -> Run:
    """Trainer.fit over the batches from the list."""
    batches: Iterator[Group] = iter(work.groups)
    return _fit(work, folder, lambda trainer: lambda: next(batches))


def scale_stream(work: Work, folder: Path) -> Run:
    """Trainer.fit over its own source."""
    return _fit(work, folder, lambda trainer: trainer.source.draw)


def _fit(work: Work, folder: Path, draw: Callable[[Any], Callable[[], Group]]) -> Run:
    trainer = build_trainer(work.config.model_copy(update={"runs_dir": str(folder)}))
    clock = Clock(work)
    watched = _Watched(draw(trainer), clock)
    trainer.source = trainer.loop.source = watched
    trainer.fit()
    return clock.run(watched.losses)


PROVIDERS: dict[str, Callable[[Work, Path], Run]] = {
    "bare": bare,
    "huggingface": huggingface,
    "scale": scale,
    "scale_stream": scale_stream,
}
