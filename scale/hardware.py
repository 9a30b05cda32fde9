"""What this machine is, and what `auto` means on it. A value: printed, overridable, no side effects."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from scale.errors import UsageError

# Dense bf16 peak by the vendors' datasheets, FLOP/s.
_BF16_PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}


@dataclass(frozen=True)
class Hardware:
    """One device of this process. `memory` is its total memory in bytes."""

    device: str
    name: str
    memory: int
    cores: int
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Choice:
    """A setting and why it is so."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


def detect(device: str = "auto") -> Hardware:
    """Look at this machine. Raises UsageError if the device asked for is not there."""
    available = {"cuda": torch.cuda.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        there = ", ".join(name for name, ok in available.items() if ok)
        raise UsageError(
            f"compute.device = {device!r}: torch {torch.__version__} finds no such device (it has: {there})"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        return Hardware("cuda", facts.name, facts.total_memory, cores, (facts.major, facts.minor))
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(device, _cpu_name(), ram, cores)


def choose_precision(asked: str, hardware: Hardware) -> Choice:
    """fp32 or bf16."""
    if asked == "bf16" and hardware.capability is not None and hardware.capability < (8, 0):
        raise UsageError(f"compute.precision = 'bf16': {hardware.name} has none in hardware (use fp32)")
    if asked != "auto":
        return Choice(asked, "asked for")
    if hardware.capability is not None and hardware.capability >= (8, 0):
        return Choice("bf16", f"capability {hardware.capability[0]}.{hardware.capability[1]} computes it natively")
    return Choice("fp32", f"{hardware.device}: exact, and no autocast overhead on small models")


def choose_compile(asked: str, hardware: Hardware) -> Choice:
    """off, default or max-autotune."""
    if asked != "auto":
        return Choice(asked, "asked for")
    if hardware.device == "cuda":
        if hardware.capability is not None and hardware.capability >= (9, 0):
            return Choice("max-autotune", "capability 9.0 or more")
        return Choice("default", "GPU")
    return Choice("off", f"{hardware.device}: compiling takes longer than a small run gains")


def choose_attention(asked: str, hardware: Hardware) -> Choice:
    """Attention implementation of the Hugging Face model; all of these honour document boundaries."""
    if asked == "flex_attention" and hardware.device == "cpu":
        raise UsageError("compute.attention = 'flex_attention': torch has no backward pass for it on a CPU (use sdpa)")
    if asked == "flash_attention_2" and hardware.device != "cuda":
        raise UsageError(f"compute.attention = 'flash_attention_2': needs CUDA, this is {hardware.device} (use sdpa)")
    if asked != "auto":
        return Choice(asked, "asked for")
    return Choice("sdpa", "part of torch, takes the mask of packed documents")


def choose_recompute(asked: str | int, parameters: int) -> Choice:
    """ "off", or recompute every k-th layer."""
    if asked != "auto":
        return Choice(str(asked), "asked for")
    if parameters >= 90_000_000:
        return Choice("4", "100M parameters or more")
    return Choice("off", "activations of a small model are cheap")


def choose_micro_rows(rows: int, seq_len: int, bytes_per_token: int, state_bytes: int, hardware: Hardware) -> Choice:
    """Rows per forward pass: the largest divisor of `rows` whose activations fit in half of what the states leave.

    `bytes_per_token` is the estimated activation memory of one token. A fixed rule on total memory, never on what is
    free at the moment, so that ranks and resumed runs agree.
    """
    room = (hardware.memory - state_bytes) * 0.5
    most = max(1, int(room / (bytes_per_token * seq_len)))
    if hardware.device == "cpu":
        most = min(most, max(1, 8192 // seq_len))  # beyond that a CPU's caches overflow and nothing is won
    size = max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)
    return Choice(str(size), f"about {size * seq_len * bytes_per_token / 2**30:.1f} GiB of activations")


def peak_flops(hardware: Hardware, precision: str) -> Choice:
    """FLOP/s that MFU is measured against: the datasheet's dense bf16 peak, or a matrix product timed here and now."""
    if hardware.device == "cuda":
        for name, peak in _BF16_PEAK.items():
            if name in hardware.name and precision == "bf16":
                return Choice(f"{peak:.4g}", f"datasheet of {name}, dense bf16")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 1024 if hardware.device == "cpu" else 8192
    a = torch.ones(size, size, dtype=dtype, device=hardware.device)
    seconds = min(_time_product(a) for _ in range(30))
    return Choice(f"{2 * size**3 / seconds:.4g}", f"measured: best of 30 {precision} products of {size} x {size}")


def _time_product(a: torch.Tensor) -> float:
    start = time.perf_counter()
    b = a @ a
    b[0, 0].item()  # waits for the device
    return time.perf_counter() - start


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
