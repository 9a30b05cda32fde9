"""FLOP/s that MFU is measured against."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path

import torch

from scale.errors import ScaleError
from scale.files import write_atomic
from scale.hardware.choices import Choice
from scale.hardware.machine import Hardware

REPEATS = 30


def peak_flops(hardware: Hardware, precision: str) -> Choice:
    """The datasheet's dense peak, or the highest rate of a matrix product that was ever timed on this machine: others may be
    using it now, and nothing makes a product faster than it can be."""
    peak, facts = hardware.peak(precision), hardware.facts
    if peak is not None and facts is not None:
        return Choice(f"{peak:.4g}", f"datasheet of {facts.title}, dense {precision}")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    size = 8192 if hardware.device == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=hardware.device)
    now = 2 * size**3 / min(_time_product(a) for _ in range(REPEATS))
    shown = f"{ {torch.float32: 'fp32', torch.bfloat16: 'bf16'}[dtype] } products of {size} x {size}"
    best = _best(f"{hardware.name}, {torch.get_num_threads()} threads, torch {torch.__version__}: {shown}", now)
    earlier = f"; {now:.4g} now, the machine is busy or throttled" if best > 1.05 * now else ""
    return Choice(f"{best:.4g}", f"measured: best of {REPEATS} {shown}, now and in earlier runs{earlier}")


def kept_peaks() -> Path:
    """Where the highest rates of this machine are kept, by what was timed."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  # no error without a home
    return Path(caches, "scale", "peak_flops.json")


def _best(what: str, now: float) -> float:
    """The highest rate known, this one included; kept for later runs where the folder can be written."""
    path = kept_peaks()
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or another program's
        kept = {}
    kept = kept if isinstance(kept, dict) else {}
    before = kept.get(what)
    if isinstance(before, float) and math.isfinite(before) and before >= now:
        return before
    with suppress(OSError, ScaleError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(kept | {what: now}, indent=1) + "\n")
    return now


def _time_product(a: torch.Tensor) -> float:
    start = time.perf_counter()
    b = a @ a
    b[0, 0].item()  # waits for the device
    return time.perf_counter() - start
