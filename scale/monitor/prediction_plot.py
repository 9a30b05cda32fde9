"""The picture of a run's prediction: what was real, what was foreseen, what jumps did, what was spent and how sure it was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from scale.monitor.curves import COLOURS, Run, smooth

COLUMNS = {
    "prediction": ("check_before", "check_after", "check_settled", "undone", "coverage"),
    "ledger": ("full", "predicted", "rejected"),
}
"""What is drawn beside the columns of a row themselves."""
PANELS = 4
BLUE, ORANGE, GREEN, PINK, YELLOW = COLOURS[:5]


def draw_prediction(axes: Sequence[Axes], run: Run, name: str, colour: str, alone: bool) -> None:
    """Four panels; `run` has the columns of `COLUMNS` as well. Predicted stretches are shaded in all of them."""
    for ax, panel in zip(axes, (losses, checks, steps, trust), strict=True):
        panel(ax, run)
        for first, last in stretches(run):
            ax.axvspan(first - 0.5, last + 0.5, color=YELLOW, alpha=0.15, linewidth=0)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(frameon=False, fontsize=8)


def stretches(run: Run) -> list[tuple[float, float]]:
    """First and last step of each unbroken row of predicted steps."""
    found: list[tuple[float, float]] = []
    for step in run["step"][run["was_predicted"] == 1]:
        if found and step == found[-1][1] + 1:
            found[-1] = (found[-1][0], step)
        else:
            found.append((step, step))
    return found


def losses(ax: Axes, run: Run) -> None:
    """Losses of real steps and of held-out data; what was foreseen is a curve of its own and never joins them."""
    step, loss = run["step"], np.where(run["was_predicted"] == 1, np.nan, run["loss"])
    ax.plot(step, loss, color=BLUE, alpha=0.25, linewidth=0.8)
    places, averages = smooth(loss, max(1, len(loss) // 40), np.mean)
    ax.plot(step[places], np.where(np.isfinite(loss[places]), averages, np.nan), color=BLUE, label="train (real steps)")
    _points(ax, run, "val_loss", "o--", ORANGE, "held-out")
    _points(ax, run, "predicted_loss", ".", PINK, "predicted, not measured")
    ax.set_ylabel("loss (nats per token)")


def checks(ax: Axes, run: Run) -> None:
    """Check loss of each jump: before it, right after it, after the settle steps; crossed out where it was undone."""
    _points(ax, run, "check_before", "o", BLUE, "before the jump")
    _points(ax, run, "check_after", "^", ORANGE, "right after")
    _points(ax, run, "check_settled", "s", GREEN, "after the settle steps")
    undone = run["undone"] == 1
    if undone.any():
        ax.plot(run["step"][undone], run["check_settled"][undone], "x", color="black", label="undone")
    ax.set_ylabel("check loss\n(nats per token)")


def steps(ax: Axes, run: Run) -> None:
    """Steps since the run began: made, counted as predicted, taken back."""
    for column, colour in (("full", BLUE), ("predicted", PINK), ("rejected", "black")):
        ax.plot(run["step"], run[column], color=colour, label=column)
    ax.set_ylabel("steps so far")


def trust(ax: Axes, run: Run) -> None:
    """Confidence of the world model at each jump, and the share of its 90% intervals that held the loss."""
    _points(ax, run, "confidence", "o", BLUE, "confidence")
    _points(ax, run, "coverage", "s--", GREEN, "coverage of 90% intervals")
    ax.axhline(0.9, color="black", linewidth=0.6, linestyle=":")
    ax.set_ylim(0, 1.05)
    ax.set_ylabel("share")


def _points(ax: Axes, run: Run, column: str, style: str, colour: str, label: str) -> None:
    """Where the column is known."""
    known = np.isfinite(run[column])
    if known.any():
        ax.plot(run["step"][known], run[column][known], style, color=colour, label=label, markersize=4, linewidth=1)
