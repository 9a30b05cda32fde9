"""What the providers of `throughput.py` are given: one configuration, its model, its weights and its packed rows."""

from __future__ import annotations

import gc
import time
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn

from benchmarks.work import Clock, Run, Work
from scale.api import PretrainRun
from scale.choices import Model
from scale.config.run import SCHEMA
from scale.hardware import choose_attention, choose_recompute, detect
from scale.models.attention import supported_attention
from scale.models.build import build_model, materialise, set_recompute
from scale.models.fp8 import convert
from scale.models.hf_config import model_config
from scale.models.size import flops_per_token, model_size
from scale.protocols import Group, Weights

EIGHT_B = {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 128, "vocab_size": 128_256}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 512, "num_hidden_layers": 2}  # fmt: skip
MODELS = {"1b": "1b", "8b": "7b", "tiny": "tiny"}
"""Name -> the preset that it starts from. 8b: one layer of a Llama 3 8B and its vocabulary, few layers."""


@dataclass(frozen=True)
class Cell:
    """One configuration of one provider. `precision`: bf16, fp8 (one scale a tensor) or fp8 rowwise; `layout`: packed
    (documents of many lengths) or whole (one document a row)."""

    provider: str
    model: str
    seq_len: int
    layout: str
    precision: str
    recompute: str = "off"


@dataclass(frozen=True)
class Settings:
    """What all configurations share. `micro`: tokens of a micro-batch."""

    device: str = "cuda"
    compile: str = "default"
    attention: str = "auto"
    kernels: str = "auto"
    layers: int = 4
    micro: int = 8192
    accumulation: int = 2
    warm_up: int = 4
    steps: int = 12


def config_of(cell: Cell, settings: Settings) -> PretrainRun:
    """The run that this configuration would be. Its data are never opened."""
    overrides: dict[str, Any] = {"1b": {}, "8b": {**EIGHT_B, "num_hidden_layers": settings.layers}, "tiny": TINY}[
        cell.model
    ]
    micro = max(1, settings.micro // cell.seq_len)
    on_cpu = settings.device == "cpu"
    return SCHEMA.validate_python({
        "version": 1,
        "kind": "pretrain",
        "name": "throughput",
        "model": {"preset": MODELS[cell.model], "overrides": overrides},
        "data": {"sources": [{"kind": "jsonl", "path": "none"}], "tokenizer": {"vocab_size": 512}, "seq_len": cell.seq_len},
        "batch": {"sequences": micro * settings.accumulation, "micro": micro},
        "train": {"steps": settings.warm_up + settings.steps + 1},
        "optim": {"lr": 3e-4},
        "schedule": {"kind": "constant", "warmup": 0},
        "compute": {
            "device": settings.device,
            "strategy": "single",
            "precision": "fp8" if cell.precision.startswith("fp8") else "bf16",
            "fp8": {
                "backend": "torchao",
                "recipe": "rowwise" if "rowwise" in cell.precision else "tensorwise",
                "emulate": on_cpu,
                "smallest": 32 if on_cpu else 1024,
            },
            "compile": settings.compile,
            "attention": settings.attention,
            "kernels": settings.kernels,
            "recompute": cell.recompute,
        },
    })  # fmt: skip


class StepClock(Clock):
    """Marks the start of every step, on a GPU as events of its stream: nothing waits until the run is over."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.warm_up, self.starts = work.warm_up, []

    def step_begins(self) -> None:
        if self.device.type == "cuda":
            if not self.starts:
                torch.cuda.reset_peak_memory_stats(self.device)  # set-up may have held more
            event: Any = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.perf_counter()
        self.starts.append(event)

    def run(self, losses: list[Any]) -> Run:
        """The finished run; the last step ends unseen."""
        pairs = list(zip(self.starts[:-1], self.starts[1:], strict=True))[self.warm_up :]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            seconds = [start.elapsed_time(end) / 1000 for start, end in pairs]
        else:
            seconds = [end - start for start, end in pairs]
        return Run([float(loss) for loss in losses], sum(seconds), seconds)


@dataclass
class GpuWork(Work):
    """A `Work` whose weights are drawn on the device, each parameter by its name, and whose steps are timed one by one."""

    attention: str = "sdpa"

    def clock(self) -> Clock:
        return StepClock(self)

    def meta(self) -> Model:
        """The Hugging Face model without memory, and its weights."""
        module, _ = build_model(self.config.model, self.hf_config, self.attention, self.config.seed)
        return Model(module, weights_on(self.device), self.hf_config)

    def model(self) -> nn.Module:
        """The model as a peer trains it: filled, in FP8 and with recompute where the configuration says so."""
        made, compute = self.meta(), self.config.compute
        if compute.precision == "fp8":
            convert(made.module, compute.fp8)
        every = choose_recompute(compute.recompute, model_size(made.module).total).value
        if every != "off":
            set_recompute(made.module, int(every))
        assert made.weights is not None
        materialise(made.module, made.weights, self.device)
        return made.module.train()

    def flops_per_token(self) -> float:
        return flops_per_token(model_size(self.meta().module), self.hf_config, self.config.data.seq_len)

    def parameters(self) -> int:
        return model_size(self.meta().module).total


def make_work(cell: Cell, settings: Settings) -> GpuWork:
    """Everything but memory. Raises UsageError for what this device cannot run."""
    config, hardware = config_of(cell, settings), detect(settings.device)
    hf_config = model_config(config.model)
    attention = choose_attention(settings.attention, hardware, supported_attention(hf_config), False, "bf16").value
    one_row = attention == "flash_attention_2"  # it takes positions for boundaries with a single row only
    rows = Rows(hf_config.vocab_size, cell.seq_len, cell.layout, one_row)
    micro = int(config.batch.micro)
    groups = [
        Group([rows.batch(micro) for _ in range(settings.accumulation)], micro * settings.accumulation * cell.seq_len)
        for _ in range(config.train.steps or 0)
    ]
    return GpuWork(
        config,
        groups,
        weights={},
        hf_config=hf_config,
        device=torch.device(hardware.device),
        precision="bf16",
        warm_up=settings.warm_up,
        compile=settings.compile,
        attention=attention,
    )


class Rows:
    """Random rows as the data stream gives them. Tokens are as frequent as words are (Zipf), so that a few steps learn
    something; lengths of packed documents are exponential with a mean of a quarter of a row."""

    def __init__(self, vocab_size: int, seq_len: int, layout: str, one_row: bool = False, seed: int = 0):
        self.seq_len, self.layout, self.one_row = seq_len, layout, one_row
        self.rng = torch.Generator().manual_seed(seed)
        self.sums_V = (1.0 / torch.arange(2, vocab_size + 2, dtype=torch.float64)).cumsum(0)

    def batch(self, rows: int) -> dict[str, Tensor]:
        """int64 tensors (B, L), or (1, B x L): input_ids, targets (shifted), position_ids, segment_ids."""
        drawn = torch.rand(rows, self.seq_len + 1, generator=self.rng, dtype=torch.float64) * self.sums_V[-1]
        ids = torch.searchsorted(self.sums_V, drawn).clamp(max=len(self.sums_V) - 1)
        starts_BL = torch.zeros(rows, self.seq_len, dtype=torch.bool)
        starts_BL[:, 0] = True
        if self.layout == "packed":
            starts_BL |= torch.rand(rows, self.seq_len, generator=self.rng) < 4 / self.seq_len
        at_L = torch.arange(self.seq_len)
        begun_BL = torch.where(starts_BL, at_L, 0).cummax(1).values
        batch = {
            "input_ids": ids[:, :-1].contiguous(),
            "targets": ids[:, 1:].contiguous(),
            "position_ids": at_L - begun_BL,
            "segment_ids": starts_BL.cumsum(1) - 1,
        }
        return {name: tensor.view(1, -1) for name, tensor in batch.items()} if self.one_row else batch


def weights_on(device: torch.device) -> Weights:
    """Initial weights drawn on the device: matrices Normal(0, 0.02), vectors 1."""

    def weights(name: str, shape: Size) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape, device=device).normal_(0.0, 0.02, generator=generator)

    return weights


def free_memory() -> None:
    """What one model left behind, before the next one takes memory."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
