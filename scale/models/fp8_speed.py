"""Is FP8 faster on this model's matrices? Measured shape by shape on the device, decided by arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from scale.config.run import Fp8Config
from scale.models.fp8 import convert_torchao

_WARM, _ROUNDS = 5, 20


@dataclass(frozen=True)
class Timing:
    """Forward and backward of one matrix (out, in), which the model has `count` times: median seconds."""

    shape: tuple[int, int]
    count: int
    bf16: float
    fp8: float

    @property
    def speedup(self) -> float:
        return self.bf16 / self.fp8


def speedup(timings: Sequence[Timing]) -> float:
    """Time of all matrices of the model in bf16 over their time in FP8; 1 without matrices."""
    if not timings:
        return 1.0
    return sum(t.count * t.bf16 for t in timings) / sum(t.count * t.fp8 for t in timings)


def measure(shapes: Mapping[tuple[int, int], int], tokens: int, config: Fp8Config) -> list[Timing]:
    """Time each shape on the current CUDA device with `tokens` rows, compiled, from fp32 weights as in training (torchao)."""
    return [
        Timing(shape, count, _seconds(shape, tokens, None), _seconds(shape, tokens, config))
        for shape, count in shapes.items()
    ]


def _seconds(shape: tuple[int, int], tokens: int, config: Fp8Config | None) -> float:
    outputs, inputs = shape
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=False, device="cuda"))
    if config is not None:
        convert_torchao(model, config, {"0"})
    model.compile()
    x_ND = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad_NO = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)

    def once() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            out_NO = model(x_ND)
        out_NO.backward(grad_NO)

    return median_seconds(once)


def median_seconds(once: Callable[[], None]) -> float:
    """Median time of a call on the current CUDA device."""
    for _ in range(_WARM):
        once()
    times = []
    for _ in range(_ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        once()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
