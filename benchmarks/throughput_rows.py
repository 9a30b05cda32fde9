"""Outcomes of `throughput.py` as rows of its CSV, and as a table."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import Machine, Row, quantiles
from benchmarks.gpu_work import Cell, Settings

OUT_OF_MEMORY = "out of memory"
NAN = math.nan


@dataclass(frozen=True)
class Result:
    """What became of one configuration: `status` is ok, or why there is no speed."""

    cell: Cell
    outcome: dict[str, Any]


def rows_of(results: Sequence[Result], settings: Settings) -> list[Row]:
    """All rows. Ratios are over the bare loop in bf16 with the same model, length and layout, if it was measured."""
    speeds = {result.cell: speed(result) for result in results if result.outcome["status"] == "ok"}
    rows: list[Row] = []
    for result in results:
        cell = result.cell
        if cell not in speeds:
            rows.append(_row(cell, "not measured", result.outcome["status"], _config(result, settings), []))
            continue
        bare = _found(speeds, cell, provider="bare", precision="bf16")
        rows.append(_row(cell, "throughput", "tokens/s", _config(result, settings), speeds[cell], bare, "bare bf16"))
        rows += _facts(result, settings, speeds[cell])
        plain = _found(speeds, cell, provider=cell.provider, precision="bf16")
        if cell.precision != "bf16" and plain:
            fp8 = [value / quantiles(plain)[1] for value in speeds[cell]]
            rows.append(_row(cell, "fp8_over_bf16", "ratio", _config(result, settings), fp8))
    return rows


def speed(result: Result) -> list[float]:
    """Tokens per second of each step on the clock."""
    return [result.outcome["tokens"] / seconds for seconds in result.outcome["seconds"]]


def _facts(result: Result, settings: Settings, speeds: list[float]) -> list[Row]:
    cell, outcome, config = result.cell, result.outcome, _config(result, settings)
    per_token = outcome["flops_per_token"] / outcome["peak_flops"]
    rows = [
        _row(cell, "mfu", "share of dense bf16 peak", config, [value * per_token for value in speeds]),
        _row(cell, "parameters", "parameters", config, [float(outcome["parameters"])]),
        _row(cell, "first_loss_difference", "relative", config, [outcome["differences"][0]]),
    ]
    if outcome["peak_bytes"] is not None:
        rows.append(_row(cell, "peak_memory", "GiB", config, [outcome["peak_bytes"] / 2**30]))
    return rows


def _found(speeds: dict[Cell, list[float]], cell: Cell, provider: str, precision: str) -> list[float]:
    """Speeds of another provider or precision in the same place; without recompute, if it was measured so."""
    asked = (provider, cell.model, cell.seq_len, cell.layout, precision)
    same = [c for c in speeds if (c.provider, c.model, c.seq_len, c.layout, c.precision) == asked]
    return speeds[same[0]] if same else []


def _row(
    cell: Cell, metric: str, unit: str, config: str, values: list[float], base: Sequence[float] = (), named: str = ""
) -> Row:
    """Steps of two processes make no pairs: the ratio is of medians, its quantiles are the widest that both spreads allow."""
    low, middle, high = quantiles(values) if values else (NAN, NAN, NAN)
    ratios = (NAN, NAN, NAN)
    if base:
        base_low, base_middle, base_high = quantiles(base)
        ratios = (middle / base_middle, low / base_high, high / base_low)
    named = named if base else ""
    return Row(
        "throughput", cell.provider, metric, unit, cell.seq_len, config, len(values), low, middle, high, named, *ratios
    )


def _config(result: Result, settings: Settings) -> str:
    cell, attention = result.cell, result.outcome.get("attention", settings.attention)
    layers = f" of {settings.layers} layers" if cell.model == "8b" else ""
    return (
        f"{cell.model}{layers}; {cell.layout}; {cell.precision}; recompute={cell.recompute}; {attention}; "
        f"compile={settings.compile}; micro={settings.micro}x{settings.accumulation}"
    )


def report(rows: Sequence[Row], machine: Machine) -> None:
    """The table: one line for each configuration."""
    title = f"{machine.device}, torch {machine.torch}, transformers {machine.transformers}, {machine.date}"
    table = Table(
        "provider",
        "length",
        "configuration",
        "tokens/s",
        "q20..q80",
        "over bare",
        "MFU",
        "GiB",
        "fp8/bf16",
        title=title,
    )
    for row in rows:
        if row.metric not in ("throughput", "not measured"):
            continue
        here = {r.metric: r.median for r in rows if (r.provider, r.x, r.config) == (row.provider, row.x, row.config)}
        if row.metric == "throughput":
            cells = [f"{row.median:,.0f}", f"{row.q20:,.0f}..{row.q80:,.0f}", _shown(row.ratio, ".3f")]
            cells += [_shown(here["mfu"], ".1%"), _shown(here.get("peak_memory", NAN), ".1f")]
            cells.append(_shown(here.get("fp8_over_bf16", NAN), ".3f"))
        else:
            cells = [row.unit]
        table.add_row(row.provider, f"{row.x:g}", row.config.split("; micro")[0], *cells)
    Console(width=None if os.isatty(1) else 160).print(table)


def _shown(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
