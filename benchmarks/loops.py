"""The training loops under comparison, each as a function (work, scratch folder) -> losses and seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.work import Clock, Run, Work
from scale.api import build_trainer
from scale.data.rows import IGNORE
from scale.protocols import Group, StepReport

MODES = {"off": None, "default": None, "max-autotune": "max-autotune-no-cudagraphs"}
"""compute.compile in torch's words."""
Summed = Callable[[Work, nn.Module, Tensor, Tensor, Tensor], Tensor]
"""The summed loss of a micro-batch on the device: (work, model, ids, positions, targets)."""


def bare(work: Work, folder: Path) -> Run:
    """What one would write by hand; never waits for the device."""
    return plain_loop(work, work.model(), summed_loss)


def plain_loop(work: Work, model: nn.Module, summed: Summed) -> Run:
    """Forward, loss, backward, clip, AdamW, schedule, zero_grad."""
    clock = work.clock()
    losses: list[Tensor] = []
    optimizer, schedule = work.optimizer(model)
    for group in work.groups:
        clock.step_begins()
        count = sum(int((batch["targets"] != IGNORE).sum()) for batch in group.batches)
        total = torch.zeros((), device=work.device)
        for batch in group.batches:
            given = (
                batch[name].to(work.device, non_blocking=True) for name in ("input_ids", "position_ids", "targets")
            )
            loss = summed(work, model, *given) / count
            loss.backward()
            total += loss.detach()
        if work.config.optim.clip > 0:
            clip_grad_norm_(model.parameters(), work.config.optim.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        del loss  # with its graph, before the next forward pass takes memory
    return clock.run(losses)


def summed_loss(work: Work, model: nn.Module, ids_BL: Tensor, position_BL: Tensor, targets_BL: Tensor) -> Tensor:
    """Cross-entropy of all logits in fp32, for a Hugging Face model."""
    with torch.autocast(work.device.type, torch.bfloat16, enabled=work.precision == "bf16"):
        logits_BLV = model(input_ids=ids_BL, position_ids=position_BL, use_cache=False).logits
        return F.cross_entropy(
            logits_BLV.float().flatten(0, 1), targets_BL.flatten(), ignore_index=IGNORE, reduction="sum"
        )


class _StepBegins(transformers.TrainerCallback):
    """Starts of steps, as Trainer announces them."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.step_begins()


class _HFTrainer(transformers.Trainer):
    """Keeps the loss of each micro-batch, which Trainer has normalised by the tokens of the whole step."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.micro_losses: list[Tensor] = []

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
    model, clock = work.model(), work.clock()
    accumulated = len(work.groups[0].batches)
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
    trainer = _HFTrainer(
        model,
        training_arguments(work, folder),
        data_collator=lambda items: items[0],
        train_dataset=micro,
        optimizers=work.optimizer(model),
        callbacks=[_StepBegins(clock)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = torch.stack(trainer.micro_losses).view(len(work.groups), accumulated).sum(1)
    return clock.run(losses.tolist())


def training_arguments(work: Work, folder: Path) -> transformers.TrainingArguments:
    """Of transformers.Trainer. With torch_compile they set all fp32 products to TF32, which would round rotary positions and
    which torch's own question for the precision does not survive: undone."""
    precision = torch.backends.fp32_precision
    made = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=len(work.groups),
        per_device_train_batch_size=1,  # an item of the data set is a whole micro-batch
        gradient_accumulation_steps=len(work.groups[0].batches),
        train_sampling_strategy="sequential",
        max_grad_norm=work.config.optim.clip,
        bf16=work.precision == "bf16",
        torch_compile=work.compile != "off",
        torch_compile_mode=MODES[work.compile],
        use_cpu=work.device.type == "cpu",
        dataloader_pin_memory=work.device.type == "cuda",
        remove_unused_columns=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it waits for the device in every step
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    torch.backends.fp32_precision = precision
    return made


class Watched:
    """A source that tells the clock when a step begins and keeps the losses it hears of."""

    def __init__(self, draw: Callable[[], Group], clock: Clock):
        self.drawn, self.clock = draw, clock
        self.losses: list[float] = []

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
    batches = iter(work.groups)
    return _fit(work, folder, lambda trainer: lambda: next(batches))


def scale_stream(work: Work, folder: Path) -> Run:
    """Trainer.fit over its own source."""
    return _fit(work, folder, lambda trainer: trainer.source.draw)


def _fit(work: Work, folder: Path, draw: Callable[[Any], Callable[[], Group]]) -> Run:
    trainer = build_trainer(work.config.model_copy(update={"runs_dir": str(folder)}))
    clock = work.clock()
    watched = Watched(draw(trainer), clock)
    trainer.source = trainer.loop.source = watched
    trainer.fit()
    return clock.run(watched.losses)


PROVIDERS: dict[str, Callable[[Work, Path], Run]] = {
    "bare": bare,
    "bare_again": bare,
    "huggingface": huggingface,
    "scale": scale,
    "scale_stream": scale_stream,
}
