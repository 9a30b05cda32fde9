"""Pictures of one run, or of several on the same axes, from nothing but their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from scale.errors import ScaleError, UsageError
from scale.monitor.curves import COLOURS, Average, Run, smooth
from scale.monitor.prediction_plot import COLUMNS, PANELS, draw_prediction
from scale.monitor.records import read_rows


def plot_run(folder: str | Path | Sequence[str | Path], out: str | Path | None = None) -> list[Path]:
    """Write loss.png, schedule.png (learning rate, gradient norm), throughput.png and, of one run that has a ledger,
    prediction.png; return their paths.

    Works on finished, dead and running runs. Several folders are drawn on the same axes, as compare_*.png.
    `out`: folder for the pictures (default: plots/ of the first run). Raises UsageError for a folder without metrics,
    ScaleError for metrics that are no numbers or pictures that cannot be written.
    """
    folders = [Path(folder)] if isinstance(folder, str | Path) else [Path(f) for f in folder]
    names = _names(folders)
    runs = {name: _columns(path) for name, path in zip(names, folders, strict=True)}
    out = Path(out) if out is not None else folders[0] / "plots"
    prefix = "compare_" if len(folders) > 1 else ""
    pictures = dict(_PICTURES)
    if len(runs) == 1 and any(np.isfinite(run["full"]).any() for run in runs.values()):
        pictures["prediction"] = (draw_prediction, PANELS)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return [_draw(runs, draw, out / f"{prefix}{name}.png", panels) for name, (draw, panels) in pictures.items()]
    except OSError as error:
        raise ScaleError(
            f"{out}: pictures cannot be written: {error.strerror} (choose another place with --out)"
        ) from None


def _loss(axes: Sequence[Axes], run: Run, name: str, colour: str, alone: bool) -> None:
    ax = axes[0]
    _raw_and_smooth(ax, run, "loss", "train" if alone else f"{name}, train", colour, np.mean)
    scored = np.isfinite(run["val_loss"])
    if scored.any():
        label, colour = ("held-out", COLOURS[1]) if alone else (f"{name}, held-out", colour)
        ax.plot(
            run["step"][scored], run["val_loss"][scored], "o--", color=colour, label=label, markersize=4, linewidth=1
        )
    ax.set_ylabel("loss (nats per token)")


def _schedule(axes: Sequence[Axes], run: Run, name: str, colour: str, alone: bool) -> None:
    axes[0].plot(run["step"], run["learning_rate"], color=colour, label=name)
    axes[0].set_ylabel("learning rate")
    axes[0].set_ylim(bottom=0)
    axes[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    _raw_and_smooth(axes[1], run, "gradient_norm", name, colour, np.median)
    axes[1].set_ylabel("gradient norm\n(before clipping)")
    if (run["gradient_norm"] > 0).any():
        axes[1].set_yscale("log")


def _throughput(axes: Sequence[Axes], run: Run, name: str, colour: str, alone: bool) -> None:
    axes[0].set_ylabel("tokens per second")
    axes[0].yaxis.set_major_formatter(EngFormatter(sep=""))
    axes[1].set_ylabel("step time (ms)")
    for ax, column in zip(axes, ("tokens_per_second", "step_time_ms"), strict=True):
        _raw_and_smooth(ax, run, column, name, colour, np.median)
        known = run[column][np.isfinite(run[column])]
        if len(known):  # a step that compiles takes minutes and would press the rest flat: it may leave the picture
            ax.set_ylim(0, max(ax.get_ylim()[1] if not ax.get_autoscaley_on() else 0, 1.3 * np.quantile(known, 0.98)))


def _raw_and_smooth(ax: Axes, run: Run, column: str, label: str, colour: str, average: Average) -> None:
    step, values = run["step"], run[column]
    window = len(values) // 40
    if window < 2:
        ax.plot(step, values, color=colour, label=label)
        return
    ax.plot(step, values, color=colour, alpha=0.25, linewidth=0.8)
    places, averages = smooth(values, window, average)
    ax.plot(step[places], averages, color=colour, linewidth=1.8, label=label)


_COLUMNS = (
    *("step", "loss", "val_loss", "learning_rate", "gradient_norm", "tokens_per_second", "step_time_ms"),
    *("was_predicted", "predicted_loss", "confidence"),
)
Painter = Callable[[Sequence[Axes], Run, str, str, bool], None]
_PICTURES: Mapping[str, tuple[Painter, int]] = {
    "loss": (_loss, 1),
    "schedule": (_schedule, 2),
    "throughput": (_throughput, 2),
}


def _draw(runs: Mapping[str, Run], paint: Painter, path: Path, panels: int) -> Path:
    figure = Figure(figsize=(8, 2.2 + 2.4 * panels), dpi=150, layout="constrained")
    axes = [figure.add_subplot(panels, 1, 1)]
    axes += [figure.add_subplot(panels, 1, i + 1, sharex=axes[0]) for i in range(1, panels)]
    for index, (name, run) in enumerate(runs.items()):
        paint(axes, run, name, COLOURS[index % len(COLOURS)], len(runs) == 1)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.margins(x=0.01)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0].set_title(" and ".join(runs) if len(runs) < 4 else f"{len(runs)} runs", loc="left", fontsize=11)
    if len(axes[0].get_legend_handles_labels()[1]) > 1:
        axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path)
    return path


def _columns(folder: Path) -> Run:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file (give the folder of a run, such as runs/NAME)")
    rows = read_rows(path)
    if not rows:
        raise UsageError(f"{path}: holds no steps yet (wait for the first one)")
    columns = {name: [_value(path, row, name) for row in rows] for name in _COLUMNS}
    for part, names in COLUMNS.items():
        within = [{"step": row["step"]} | (row.get(part) or {}) for row in rows]
        columns |= {name: [_value(path, row, name) for row in within] for name in names}
    return {name: np.array(values, dtype=np.float64) for name, values in columns.items()}


def _value(path: Path, row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    if value is None:
        return float("nan")
    if not isinstance(value, int | float):
        raise ScaleError(f"{path}: step {row['step']}: {name} = {value!r}: is no number (restore the file)")
    return value


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names; whole paths where two are alike."""
    names = [path.resolve().name for path in folders]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, folders, strict=True)]
