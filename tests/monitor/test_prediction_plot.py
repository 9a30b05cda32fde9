"""The picture of prediction, from a metrics.jsonl that a test wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scale.monitor import prediction_plot
from scale.monitor.plots import _columns, plot_run
from scale.monitor.records import Metrics
from scale.protocols import Score, StepReport
from tests.monitor.test_plots import BLUE, GREEN, ORANGE, coloured, write

PINK = (204, 121, 167)
PREDICTED = [*range(41, 61), *range(81, 86)]


def kind_of(step: int) -> str:
    return "predict" if step in PREDICTED else "correct" if 36 <= step <= 40 or 76 <= step <= 80 else "full"


def said(step: int) -> dict[str, Any]:
    """A jump before step 36 that is judged and paid after 40, one before 76 that is undone."""
    ledger = {
        "full": step - sum(p <= step for p in PREDICTED),
        "predicted": sum(p <= step for p in PREDICTED),
        "rejected": 10 * (step >= 80),
    }
    found: dict[str, Any] = {"phase": "full", "ledger": ledger}
    if step in (36, 76):
        found |= {"confidence": 0.9, "check_before": 3.0, "check_after": 2.8, "kept": 20, "coverage": 0.88}
    if step in (40, 80):
        found |= {"check_settled": 2.5 if step == 40 else 3.1, "undone": step == 80, "coverage": 0.91}
    if kind_of(step) == "predict":
        found["predicted_loss"] = 1.5
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.append(metrics.score_row(0, Score(9.0, 1), {}))
    for step in range(1, 101):
        counted = kind_of(step) == "predict"
        loss = math.nan if counted else 2 + 6 / step
        report = StepReport(step, kind_of(step), loss, 1.0, 1e-3, 0 if counted else 4096, 1, 1, 4096, 4096, 0.1)  # type: ignore[arg-type]
        report.prediction = said(step)
        metrics.append(metrics.row(report, Score(2.2, 1) if step % 25 == 0 else None, {}))
    return folder


def drawn(panel: Any, run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> points of what a panel draws."""
    ax: Axes = Figure().add_subplot()
    panel(ax, _columns(run))
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}  # type: ignore[arg-type]


def test_only_a_run_with_a_ledger_has_the_picture(run: Path, tmp_path: Path) -> None:
    paths = plot_run(run)
    assert [path.name for path in paths] == ["loss.png", "schedule.png", "throughput.png", "prediction.png"]
    assert all(coloured(paths[-1], *colour) > 100 for colour in (BLUE, ORANGE, GREEN, PINK))
    plain = write(tmp_path / "plain", 30)
    assert "prediction.png" not in {path.name for path in plot_run(plain)}
    assert all("prediction" not in path.name for path in plot_run([run, plain], tmp_path / "both"))


def test_predicted_losses_are_a_curve_of_their_own(run: Path) -> None:
    lines = drawn(prediction_plot.losses, run)
    steps, values = lines["predicted, not measured"]
    assert steps == PREDICTED and set(values) == {1.5}
    steps, values = lines["train (real steps)"]
    real = [step for step, value in zip(steps, values, strict=True) if np.isfinite(value)]
    assert real == [step for step in range(1, 101) if step not in PREDICTED]
    assert min(value for value in values if np.isfinite(value)) > 2
    assert lines["held-out"] == ([0, 25, 50, 75, 100], [9.0, 2.2, 2.2, 2.2, 2.2])


def test_predicted_stretches(run: Path) -> None:
    assert prediction_plot.stretches(_columns(run)) == [(41, 60), (81, 85)]


def test_checks_steps_and_trust(run: Path) -> None:
    lines = drawn(prediction_plot.checks, run)
    assert lines["before the jump"] == ([36, 76], [3.0, 3.0]) and lines["right after"] == ([36, 76], [2.8, 2.8])
    assert lines["after the settle steps"] == ([40, 80], [2.5, 3.1]) and lines["undone"] == ([80], [3.1])
    lines = drawn(prediction_plot.steps, run)
    assert [lines[name][1][-1] for name in ("full", "predicted", "rejected")] == [75, 25, 10]
    lines = drawn(prediction_plot.trust, run)
    assert lines["confidence"] == ([36, 76], [0.9, 0.9])
    assert lines["coverage of 90% intervals"] == ([36, 40, 76, 80], [0.88, 0.91, 0.88, 0.91])


def test_a_run_that_only_watches_has_no_points_of_jumps(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    metrics = Metrics(folder / "metrics.jsonl")
    for step in range(1, 4):
        report = StepReport(step, "full", 2.0, 1.0, 1e-3, 4096, 1, 1, 4096, 4096, 0.1)
        report.prediction = {"phase": "warmup", "ledger": {"full": step, "predicted": 0, "rejected": 0}}
        metrics.append(metrics.row(report, None, {}))
    assert plot_run(folder)[-1].name == "prediction.png"
    assert drawn(prediction_plot.checks, folder) == {}
