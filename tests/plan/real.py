"""One real training step, with every allocation of torch's CPU allocator recorded: what a plan must foresee."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scale.config.model import ModelConfig
from scale.config.optim import OptimConfig, ScheduleConfig
from scale.config.run import FsdpConfig
from scale.models.build import build_model, set_recompute
from scale.models.hf_config import model_config
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.parallel.fsdp import Fsdp
from scale.parallel.ranks import Ranks
from scale.parallel.single import Single
from scale.plan.fake import fake_ranks, fake_tensors, fake_weights
from scale.plan.memory import Memory, fake_batch, trace_step
from scale.protocols import Group
from scale.train.step import BackwardStepper, StepSettings

TINY = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000}  # fmt: skip
MIDDLE = {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 8, "num_attention_heads": 7,
          "num_key_value_heads": 7, "head_dim": 64, "vocab_size": 16_384}  # fmt: skip


def model_of(sizes: dict[str, int], recompute: int = 0) -> Any:
    """A meta Llama and its weights."""
    config = ModelConfig(preset="tiny", overrides=sizes)
    module, weights = build_model(config, model_config(config), "sdpa", seed=0)
    if recompute:
        set_recompute(module, recompute)
    return module, weights


def strategy_of(ranks: Ranks, precision: str, sharded: bool, **fsdp: Any) -> Any:
    return Fsdp(ranks, FsdpConfig(**fsdp), precision) if sharded else Single("cpu", precision)


class Packed:
    """A source of one group: rows of two documents each."""

    def __init__(self, rows: int, seq_len: int, micros: int, vocab: int):
        positions = torch.arange(seq_len // 2).repeat(rows, 2)
        ids = torch.randint(vocab, (rows, seq_len), generator=torch.Generator().manual_seed(0))
        one = {"input_ids": ids, "targets": ids, "position_ids": positions, "segment_ids": torch.zeros_like(ids)}
        self.group = Group([one] * micros, tokens=rows * seq_len * micros)

    def draw(self) -> Group:
        return self.group

    def publish(self, version: int, params: Any) -> None:
        pass


def real_step(
    ranks: Ranks,
    sizes: dict[str, int],
    rows: int,
    seq_len: int,
    micros: int,
    optim: dict[str, Any],
    precision: str = "fp32",
    recompute: int = 0,
    loss: str = "full",
    sharded: bool = False,
    **fsdp: Any,
) -> int:
    """Peak bytes of the second training step, weights and moments included, by the allocator's own account."""
    source = Packed(rows, seq_len, micros, sizes["vocab_size"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        module, weights = model_of(sizes, recompute)
        strategy = strategy_of(ranks, precision, sharded, **fsdp)
        config = OptimConfig(**optim)
        objective = CausalLM(loss=loss)
        root: nn.Module = strategy.prepare(Root(module, objective), config, weights)
        settings = StepSettings(steps=10, lr=config.lr, schedule=ScheduleConfig(warmup=0))
        stepper = BackwardStepper(root, objective, strategy, settings)
        stepper.step(source)
        with torch.profiler.record_function("second step"):
            stepper.step(source)
    return _highest(profile)


def _highest(profile: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    step = next(e for e in events if e.get("name") == "second step" and e.get("ph") == "X")
    start, end = float(step["ts"]), float(step["ts"]) + float(step["dur"])
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"]))
    first = memory[0]["args"]
    before = int(first["Total Allocated"]) - int(first["Bytes"])  # what earlier profiles saw made and not freed
    return max(int(e["args"]["Total Allocated"]) for e in memory if start <= float(e["ts"]) <= end) - before


def planned_step(
    world_size: int,
    sizes: dict[str, int],
    rows: int,
    seq_len: int,
    micros: int,
    optim: dict[str, Any],
    precision: str = "fp32",
    recompute: int = 0,
    loss: str = "full",
    sharded: bool = False,
    **fsdp: Any,
) -> Memory:
    """The same step on fake tensors."""
    module, _ = model_of(sizes, recompute)
    config = OptimConfig(**optim)
    with fake_ranks(world_size) as ranks:
        strategy = strategy_of(ranks, precision, sharded, **fsdp)
        getattr(strategy, "mesh", None)
        with fake_tensors():
            root = strategy.prepare(Root(module, CausalLM(loss=loss)), config, fake_weights)
            return trace_step(root, strategy, fake_batch(rows, seq_len), min(micros, 2), config.clip)
