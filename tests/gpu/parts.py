"""A small language model, packed rows and a stepper over them, on any device."""

from __future__ import annotations

import torch

from benchmarks.gpu_work import Rows
from scale.config.model import ModelConfig
from scale.config.optim import OptimConfig, ScheduleConfig
from scale.models.build import build_model
from scale.models.fp8 import convert
from scale.models.hf_config import model_config
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.parallel.single import Single
from scale.protocols import Group
from scale.train.step import BackwardStepper, StepSettings

VOCAB, LENGTH = 512, 256
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": VOCAB, "tie_word_embeddings": False}  # fmt: skip


class Steps:
    """Source: every step has `rows` new packed rows in micro-batches of `micro`."""

    def __init__(self, rows: int = 8, micro: int = 4, vocab: int = VOCAB):
        self.made, self.count, self.rows, self.micro = Rows(vocab, LENGTH, "packed"), 0, rows, micro

    def draw(self) -> Group:
        self.count += 1
        batch = self.made.batch(self.rows)
        cut = range(0, self.rows, self.micro)
        parts = [{name: tensor[i : i + self.micro] for name, tensor in batch.items()} for i in cut]
        return Group(parts, tokens=self.rows * LENGTH)

    def publish(self, version: int, params: object) -> None:
        """Nobody listens."""


def make_stepper(strategy, attention="sdpa", loss="full", fp8=None, events=None, **overrides):
    """A stepper over a fresh model, the same weights every time."""
    config = ModelConfig(preset="tiny", overrides=SIZES | overrides)
    model, weights = build_model(config, model_config(config), attention, seed=0)
    if fp8 is not None:
        convert(model, fp8)
    objective, optim = CausalLM(loss=loss, one_row=attention == "flash_attention_2"), OptimConfig(lr=1e-3)
    root = strategy.prepare(Root(model, objective), optim, weights)
    settings = StepSettings(steps=100, lr=optim.lr, schedule=ScheduleConfig(kind="constant", warmup=0))
    heard = [] if events is None else events
    return BackwardStepper(root, objective, strategy, settings, event=lambda *event: heard.append(event))


def losses(stepper, steps=6, **source):
    drawn = Steps(**source)
    return [stepper.step(drawn).loss for _ in range(steps)]


def single(device, precision="fp32", steps=6, **options):
    """Losses of a run on one device."""
    return losses(make_stepper(Single(device, precision), **options), steps)


def peak_memory(run):
    """What `run` returns, and the bytes that torch's allocator had given out at most meanwhile, over those before."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value = run()
    return value, torch.cuda.max_memory_allocated() - before
