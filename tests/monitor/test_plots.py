"""Pictures from metrics.jsonl alone: of finished, dead and running runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from scale.errors import ScaleError, UsageError
from scale.monitor.curves import smooth
from scale.monitor.plots import plot_run
from scale.monitor.records import Metrics
from scale.protocols import Score, StepReport


def write(folder: Path, steps: int, loss: float | None = None, factor: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.append(metrics.score_row(0, Score(9.0, 1), {}))
    for step in range(1, steps + 1):
        value = factor * (2 + 6 / step) if loss is None else loss
        report = StepReport(step, "full", value, 1.0, 1e-3, 4096, 1, 1, 4096, 4096, 0.1)
        metrics.append(metrics.row(report, Score(value, 1) if step % 10 == 0 else None, {}))
    return folder


def coloured(path: Path, red: int, green: int, blue: int) -> int:
    """Pixels of about this colour."""
    image = imread(path)[..., :3] * 255
    return int((np.abs(image - [red, green, blue]).max(axis=-1) < 12).sum())


BLUE, ORANGE, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)


def test_three_pictures_with_curves_in_them(tmp_path: Path) -> None:
    paths = plot_run(write(tmp_path / "run", 200))
    assert paths == [tmp_path / "run" / "plots" / f"{name}.png" for name in ("loss", "schedule", "throughput")]
    assert all(coloured(path, *BLUE) > 500 for path in paths)
    assert coloured(paths[0], *ORANGE) > 200  # held-out points


def test_several_runs_share_the_axes(tmp_path: Path) -> None:
    runs = [write(tmp_path / name, 100, factor=factor) for name, factor in (("a", 1.0), ("b", 1.5), ("c", 2.0))]
    paths = plot_run(runs, tmp_path / "out")
    assert [path.name for path in paths] == ["compare_loss.png", "compare_schedule.png", "compare_throughput.png"]
    assert all(path.parent == tmp_path / "out" for path in paths)
    assert all(coloured(paths[0], *colour) > 500 for colour in (BLUE, ORANGE, GREEN))


@pytest.mark.parametrize("steps", [0, 1, 2, 79, 81])
def test_short_runs_and_torn_lines(tmp_path: Path, steps: int) -> None:
    folder = write(tmp_path / "run", steps)
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 9')
    assert len(plot_run(str(folder))) == 3


def test_a_run_whose_losses_are_all_nan(tmp_path: Path) -> None:
    assert len(plot_run(write(tmp_path / "run", 50, loss=math.nan))) == 3


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing/metrics\.jsonl: there is no such file"):
        plot_run(tmp_path / "nothing")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="holds no steps yet"):
        plot_run([tmp_path])
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("value", ["1.5", "low", [1.0], {"a": 1}])
def test_a_loss_that_is_no_number_is_one_line(tmp_path: Path, value: object) -> None:
    folder = write(tmp_path / "run", 3)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "loss": value})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ScaleError) as caught:
        plot_run(folder)
    assert f"metrics.jsonl: step 2: loss = {value!r}: is no number" in str(caught.value)
    assert "\n" not in str(caught.value) and not (folder / "plots").exists()


def test_smoothing_neither_lags_nor_bends_and_leaves_out_nan() -> None:
    line = np.arange(100.0)
    places, averages = smooth(line, 20, np.mean)
    assert (places == np.arange(100)).all() and averages == pytest.approx(line)
    holed = np.where(np.arange(100) % 10 == 0, np.nan, 5.0)
    assert smooth(holed, 20, np.mean)[1][1:-1] == pytest.approx(np.full(98, 5.0))
    spike = np.where(np.arange(100) == 50, 1e6, 1.0)
    assert (smooth(spike, 20, np.median)[1] == 1.0).all()
    places, averages = smooth(np.arange(10_000.0), 100, np.mean)
    assert len(places) == 500 and places[0] == 0 and places[-1] == 9999 and averages == pytest.approx(places)
