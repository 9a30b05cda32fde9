"""What `auto` means on a device. Each choice is a value with its reason: printed, overridable, no side effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scale.errors import MissingExtra, UsageError
from scale.hardware.machine import Hardware, installed

FP8_GAIN = 1.05
"""FP8 is chosen by itself only if a model's matrix products were measured to be this much faster with it."""
LOGITS = 2**30
"""Bytes of logits (with what their loss and backward pass hold beside them) above which `auto` chunks the loss."""


@dataclass(frozen=True)
class Choice:
    """A setting and why it is so."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


def bytes_shown(size: float) -> str:
    """GiB, or MiB below one."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def has_fp8(hardware: Hardware) -> bool:
    """Whether the device multiplies in FP8 (Ada, Hopper, Blackwell)."""
    return hardware.capability is not None and hardware.capability >= (8, 9)


def choose_precision(asked: str, hardware: Hardware, emulate: bool = False, speedup: float | None = None) -> Choice:
    """fp32, bf16 or fp8. `speedup`: of this model's matrix products in FP8 over bf16, None if not measured; `emulate`:
    compute.fp8.emulate."""
    if asked == "bf16" and hardware.capability is not None and hardware.capability < (8, 0):
        raise UsageError(f"compute.precision = 'bf16': {hardware.name} has none in hardware (use fp32)")
    if asked == "fp8" and not emulate and not has_fp8(hardware):
        raise UsageError(
            f"compute.precision = 'fp8': {hardware.name} has none in hardware (use auto; compute.fp8.emulate=true rounds only)"
        )
    if asked != "auto":
        return Choice(asked, "asked for, emulated: never faster" if asked == "fp8" and emulate else "asked for")
    if speedup is not None and speedup >= FP8_GAIN:
        return Choice("fp8", f"measured {speedup:.2f}x as fast as bf16 on this model's matrices")
    if hardware.capability is not None and hardware.capability >= (8, 0):
        native = f"capability {hardware.capability[0]}.{hardware.capability[1]} computes it natively"
        slower = "" if speedup is None else f"; fp8 was measured only {speedup:.2f}x as fast"
        return Choice("bf16", native + slower)
    if hardware.device == "mps":
        return Choice("fp32", "mps: exact; this device is untested")
    return Choice("fp32", f"{hardware.device}: exact, and no autocast overhead on small models")


def choose_compile(asked: str, hardware: Hardware, strategy: str = "single") -> Choice:
    """off, default or max-autotune. Raises UsageError for compiling under deepspeed."""
    if strategy == "deepspeed" and asked not in ("auto", "off"):
        raise UsageError(
            f"compute.compile = {asked!r}: not with compute.strategy=deepspeed, whose hooks inside the model are compiled "
            "anew again and again (use fsdp, or compute.compile=off)"
        )
    if asked != "auto":
        return Choice(asked, "asked for")
    if strategy == "deepspeed":
        return Choice("off", "DeepSpeed's hooks inside the model cannot be compiled")
    if hardware.device == "cuda":
        if hardware.capability is not None and hardware.capability >= (9, 0):
            return Choice("max-autotune", "capability 9.0 or more")
        return Choice("default", "GPU")
    return Choice("off", f"{hardware.device}: compiling takes longer than a small run gains")


_EVERYWHERE = ("sdpa", "eager", "flex_attention", "flash_attention_2")


def choose_attention(
    asked: str,
    hardware: Hardware,
    supported: Sequence[str] = _EVERYWHERE,
    cross_documents: bool = False,
    precision: str = "bf16",
) -> Choice:
    """Attention implementation, by device, mask and what the model's class supports; all honour document boundaries.

    Raises UsageError for one that the model or the device cannot run, MissingExtra where its package is missing.
    """
    if asked != "auto":
        _check_attention(asked, hardware, supported, precision)
        return Choice(asked, "asked for")
    modern = hardware.capability is not None and hardware.capability >= (8, 0)
    if modern and not cross_documents:
        if "flash_attention_2" in supported and precision != "fp32" and installed("flash_attn"):
            return Choice("flash_attention_2", "packed documents at no cost, as one row of many lengths")
        if "flex_attention" in supported:
            return Choice("flex_attention", "skips what other documents hold; sdpa would read a full mask")
    if "sdpa" in supported:
        mask = "attention crosses documents" if cross_documents else "takes the mask of packed documents"
        return Choice("sdpa", f"part of torch, {mask}")
    if modern and "flex_attention" in supported:
        return Choice("flex_attention", "the model does not support sdpa")
    return Choice("eager", "the model does not support sdpa")


def _check_attention(asked: str, hardware: Hardware, supported: Sequence[str], precision: str) -> None:
    where = f"compute.attention = {asked!r}"
    if asked not in supported:
        raise UsageError(f"{where}: this model does not support it (it has: {', '.join(supported)})")
    instead = "sdpa" if "sdpa" in supported else "eager"
    if asked == "flex_attention" and hardware.device != "cuda":
        raise UsageError(f"{where}: torch has no backward pass for it on {_a(hardware)} (use {instead})")
    if asked != "flash_attention_2":
        return
    if hardware.capability is None or hardware.capability < (8, 0):
        raise UsageError(f"{where}: needs CUDA and capability 8.0, this is {hardware.name} (use {instead})")
    if precision == "fp32":
        raise UsageError(f"{where}: does not compute in fp32 (use compute.precision=bf16, or {instead})")
    if not installed("flash_attn"):
        raise MissingExtra(where, "flash")


def _a(hardware: Hardware) -> str:
    return "a CPU" if hardware.device == "cpu" else hardware.device


def choose_kernels(asked: str, hardware: Hardware, model_type: str, known: bool) -> Choice:
    """off or liger. `known`: Liger has kernels for this model type. Raises UsageError where they cannot run."""
    if asked == "off":
        return Choice("off", "asked for")
    if asked == "liger":
        if hardware.device != "cuda":
            raise UsageError(f"compute.kernels = 'liger': its kernels need CUDA, this is {hardware.device} (use off)")
        if not installed("liger_kernel"):
            raise MissingExtra("compute.kernels = 'liger'", "kernels")
        if not known:
            raise UsageError(f"compute.kernels = 'liger': Liger has no kernels for {model_type!r} (use off)")
        return Choice("liger", "asked for")
    if hardware.device != "cuda":
        return Choice("off", f"{hardware.device}: Liger's kernels need CUDA")
    if not installed("liger_kernel"):
        return Choice("off", "liger-kernel is not installed")
    if not known:
        return Choice("off", f"Liger has no kernels for {model_type}")
    return Choice("liger", "CUDA, and Liger knows the model")


def choose_loss(
    asked: str, hardware: Hardware, tokens: int, vocab_size: int, obstacle: str | None, precision: str = "bf16"
) -> Choice:
    """full, chunked or cce, for micro-batches of `tokens`. `obstacle`: why the model's head cannot be called by itself."""
    where = f"compute.loss = {asked!r}"
    if asked in ("chunked", "cce") and obstacle is not None:
        raise UsageError(f"{where}: {obstacle} (use full)")
    if asked == "cce":
        if hardware.device != "cuda":
            raise UsageError(f"{where}: its kernel needs CUDA, this is {hardware.device} (use chunked)")
        if precision == "fp32":
            raise UsageError(f"{where}: its kernel does not compute in fp32 (use chunked, or compute.precision=bf16)")
        if not installed("cut_cross_entropy"):
            raise MissingExtra(where, "cce")
        return Choice("cce", "asked for; untested")
    if asked != "auto":
        return Choice(asked, "asked for")
    size = tokens * vocab_size * 4 * 3
    shown = f"all logits take about {bytes_shown(size)}"
    if obstacle is not None:
        return Choice("full", f"{shown}; {obstacle}")
    return Choice("chunked" if size > LOGITS else "full", shown)


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
    return Choice(str(size), f"about {bytes_shown(size * seq_len * bytes_per_token)} of activations")
