"""What all benchmarks share: the row of a measurement, results/NAME.csv, quantiles, plots and a table.

A row is one metric of one provider at one x, measured `n` times. `ratio` is the median of the paired ratios to the
provider named by `baseline`: each measurement is divided by the baseline's of the same round, so that what slows a
whole round down cancels out.
"""

from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from scale.files import write_atomic
from scale.hardware import detect
from scale.monitor.run_state import read_git

RESULTS = Path(__file__).parent / "results"
QUANTILES = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Machine:
    """Where and with what a row was measured. `device` and `cpus` say which machine it is."""

    date: str
    device: str
    cpus: int
    python: str
    torch: str
    triton: str
    transformers: str
    commit: str


@dataclass(frozen=True)
class Row:
    """One line of the CSV. `x` is the swept quantity, `config` the rest of what tells measurements apart."""

    benchmark: str
    provider: str
    metric: str
    unit: str
    x: float
    config: str
    n: int
    q20: float
    median: float
    q80: float
    baseline: str
    ratio: float
    ratio_q20: float
    ratio_q80: float


FIELDS = [field.name for field in (*fields(Row), *fields(Machine))]
SAME_MACHINE = ("device", "cpus")


def this_machine(device: str = "auto") -> Machine:
    """This machine with `device` ("auto", "cpu", "cuda") as the thing that is measured."""
    hardware = detect(device)
    return Machine(
        date=datetime.now(UTC).date().isoformat(),
        device=hardware.name,
        cpus=hardware.cores,
        python=platform.python_version(),
        torch=torch.__version__,  # with its CUDA, which the metadata leave out
        triton=_version("triton"),
        transformers=_version("transformers"),
        commit=(read_git(Path(__file__).parent)["git_commit"] or "")[:12],
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, linear between order statistics."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), QUANTILES)
    return float(low), float(middle), float(high)


def positive(text: str) -> int:
    """For argparse: 1 or more."""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def paired_ratios(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Each value over the baseline's of the same round."""
    return [value / base for value, base in zip(values, baseline, strict=True)]


def summarise(
    benchmark: str,
    metric: str,
    unit: str,
    x: float,
    config: str,
    measured: dict[str, list[float]],
    baseline: str,
) -> list[Row]:
    """One row per provider from what each measured in every round; one that ran fewer rounds is paired with the first ones."""
    rows = []
    for provider, values in measured.items():
        low, ratio, high = quantiles(paired_ratios(values, measured[baseline][: len(values)]))
        spread = quantiles(values)
        rows.append(Row(benchmark, provider, metric, unit, x, config, len(values), *spread, baseline, ratio, low, high))
    return rows


def write_csv(path: Path, rows: Iterable[Row], machine: Machine) -> None:
    """Put `rows` into a CSV in place of all rows that the same machine had there; rows of other machines stay."""
    ours = [{**_shown(asdict(row)), **_shown(asdict(machine))} for row in rows]
    key = [_shown(asdict(machine))[name] for name in SAME_MACHINE]
    others = [old for old in read_csv(path) if [old[name] for name in SAME_MACHINE] != key]
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*others, *ours])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """All rows of a results file; none if it is not there yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def _shown(row: dict[str, object]) -> dict[str, str]:
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()}


def print_table(rows: Sequence[Row], title: str) -> None:
    """Providers against their baseline, on the terminal."""
    table = Table("provider", "x", "n", "q20", "median", "q80", f"over {rows[0].baseline}", "q20..q80", title=title)
    for row in rows:
        spread = [f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in (row.q20, row.median, row.q80)]
        ratios = (f"{row.ratio:.4f}", f"{row.ratio_q20:.4f}..{row.ratio_q80:.4f}")
        table.add_row(row.provider, f"{row.x:g}", str(row.n), *spread, *ratios)
    Console(width=None if os.isatty(1) else 120).print(table)


def bar_plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """One bar per provider, medians with their 20th to 80th percentile; for rows of a single x."""
    figure, axes = _axes(title, f"{rows[0].metric} ({rows[0].unit})")
    medians = [row.median for row in rows]
    errors = [[row.median - row.q20 for row in rows], [row.q80 - row.median for row in rows]]
    axes.bar([row.provider for row in rows], medians, yerr=errors, capsize=4)
    _save(figure, path)


def line_plot(path: Path, rows: Sequence[Row], title: str, x_label: str) -> None:
    """One line per provider over x, medians with a band from the 20th to the 80th percentile."""
    figure, axes = _axes(title, f"{rows[0].metric} ({rows[0].unit})")
    for provider in dict.fromkeys(row.provider for row in rows):
        line = sorted((row for row in rows if row.provider == provider), key=lambda row: row.x)
        x = [row.x for row in line]
        axes.plot(x, [row.median for row in line], marker="o", label=provider)
        axes.fill_between(x, [row.q20 for row in line], [row.q80 for row in line], alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(x_label)
    axes.legend()
    _save(figure, path)


def _axes(title: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_ylabel(y_label)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
