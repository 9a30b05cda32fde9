"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scale.hardware.choices import bytes_shown
from scale.monitor.progress import facts_table
from scale.plan.advice import Knob
from scale.plan.memory import PARTS
from scale.plan.plan import Plan

_SHOWN = ("strategy", "precision", "attention", "kernels", "recompute", "loss")
_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def print_plan(plan: Plan, knobs: Sequence[Knob], console: Console | None = None) -> None:
    """Facts, memory by part, and what to change where it does not fit."""
    console = console or Console()
    facts_table(_facts(plan), console)
    console.print()
    console.print(_memory(plan))
    _print(console, _verdict(plan))
    if plan.fits and knobs:
        _print(console, "room to spare; by the datasheets (an estimate, nothing was measured) a step would be:")
    for knob in knobs:
        outcome = f"{knob.speedup:.2f}x as fast" if plan.fits else "fits" if knob.fits else "too much"
        _print(console, f"  {outcome}: {knob.change}  (peak {bytes_shown(knob.peak)})")
    if knobs and not any(knob.fits for knob in knobs):
        _print(console, "  nothing tried here fits: use more or larger GPUs, shorter rows or a smaller model")


def _facts(plan: Plan) -> Mapping[str, Any]:
    settled, config, choices = plan.settled, plan.settled.config, plan.settled.choices
    trained = "" if plan.size.trainable == plan.size.total else f", {count(plan.size.trainable)} trained"
    active = "" if plan.active == plan.size.total else f", {count(plan.active)} active for a token"
    filled = "rows taken as full" if plan.fill == 1 else f"rows {plan.fill:.1%} filled"
    tokens = count(plan.steps * config.tokens_per_step * plan.fill)
    return {
        "run": f"{config.name} on {settled.gpus} x {settled.hardware.name}",
        "parameters": f"{count(plan.size.total)}{trained}{active}",
        **{name: str(getattr(choices, name)) for name in _SHOWN},
        "tokens per step": f"{config.tokens_per_step:,} ({config.rows_per_step} rows of {config.data.seq_len})",
        "micro-batch": f"{settled.micro_rows} row(s) x {settled.accumulation} accumulated x {settled.gpus} GPU(s)",
        "length": f"{plan.steps:,} steps, {tokens} tokens ({filled})",
        **({"passes over the sources": plan.passes} if plan.passes else {}),
        "FLOPs": f"{plan.flops:.3g} ({plan.flops_per_token:.3g} a token)",
        "time": f"{duration(plan.days)}, {plan.gpu_hours:,.0f} GPU-hours, at {plan.mfu:.0%} of "
        f"{plan.peak_flops / 1e12:,.0f} TFLOP/s ({choices.peak_flops.reason})",
    }


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    unit, size = _unit(memory.peak)
    shown = partial(_in, size)
    table = Table("memory of one GPU", f"in full ({unit})", f"at the peak ({unit})", title=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in (name for name in PARTS if name != "prediction" or memory.at_peak[name]):
        whole = shown(memory.held[name]) if name in memory.held else ""
        table.add_row(name, whole, shown(memory.at_peak[name]))
    table.add_section()
    table.add_row("peak", "", shown(memory.peak))
    table.add_row(f"usable of {shown(plan.settled.hardware.memory)}", "", shown(plan.usable))
    if memory.host:
        table.add_row("CPU memory for each GPU", shown(memory.host), "")
    return table


def _verdict(plan: Plan) -> str:
    share = plan.memory.peak / plan.usable
    if plan.fits:
        return f"fits: {share:.0%} of what a step may fill ({plan.memory.method})"
    return f"does not fit: {share:.0%} of what a step may fill ({plan.memory.method})"


def count(number: float) -> str:
    """1,234,567 as "1.23M"; B is a thousand million."""
    for size, letter in _SCALES:
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def duration(days: float) -> str:
    """Days, or hours and minutes where they are fewer."""
    if days >= 2:
        return f"{days:,.1f} days"
    if days * 24 >= 2:
        return f"{days * 24:.1f} hours"
    return f"{days * 1440:.1f} minutes"


def _unit(size: int) -> tuple[str, int]:
    """GiB, or MiB below one."""
    return ("GiB", 2**30) if size >= 2**30 else ("MiB", 2**20)


def _in(one: int, size: int) -> str:
    return f"{size / one:,.2f}"


def _print(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)
