"""`scale forecast` on run folders: running, dead, finished, broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from scale.cli.main import main
from scale.config import load_config, to_yaml
from scale.monitor.forecast import forecast_run
from tests.conftest import tiny_run
from tests.forecast.synthetic import LAW, factors, fast_law

STEPS = 400


def run_folder(folder: Path, known: int = STEPS, train: dict[str, Any] | None = None) -> Path:
    """A run of 400 steps whose losses follow the Multi-Power Law, known up to a step; some steps predicted or skipped."""
    folder.mkdir()
    source = folder / "given.yaml"
    schedule = {"kind": "wsd", "warmup": 0.05, "final": 0.0, "decay": 0.3}
    source.write_text(yaml.safe_dump(tiny_run(folder, train=train or {"steps": STEPS}, schedule=schedule)))
    (folder / "config.yaml").write_text(to_yaml(load_config(source)))
    lr_T, warmup = factors(STEPS)
    loss_T = np.nan_to_num(fast_law(lr_T, warmup, LAW), nan=4.0)
    loss_T *= np.exp(0.03 * np.random.default_rng(0).standard_normal(STEPS))
    rows = [{"step": 0, "loss": None, "phase": None, "was_predicted": False, "skipped": None, "val_loss": 5.5}]
    for step in range(1, known + 1):
        row = {"step": step, "loss": loss_T[step - 1], "phase": "full", "was_predicted": False, "skipped": None}
        if step % 50 == 7:
            row |= {"loss": 99.0, "phase": "predict", "was_predicted": True}
        if step % 50 == 9:
            row |= {"loss": 77.0, "phase": "skipped", "skipped": "spike: loss"}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def scale(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scale.cli.main", "forecast", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_running_run_as_a_table_and_a_picture(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", known=250)
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 25')  # still being written
    done = scale(folder)
    assert done.returncode == 0, done.stderr
    for said in ("mine: loss at step 400", "> multi-power law", "power law", "last value", "is a prior's"):
        assert said in done.stdout
    assert "measured" not in done.stdout
    image = imread(folder / "plots" / "forecast.png")[..., :3] * 255
    for colour in ((0, 114, 178), (213, 94, 0)):  # the curve, the forecast
        assert (np.abs(image - colour).max(axis=-1) < 12).sum() > 300


def test_a_finished_run_scores_its_first_part(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine")
    done = scale(folder, "--at", "0.85", "--json", "--out", tmp_path / "half.png")
    told = json.loads(done.stdout)
    assert told["known_step"] == 340 and told["chosen"] == "multi-power law" and told["picture"].endswith("half.png")
    assert (tmp_path / "half.png").is_file() and not (folder / "plots").exists()
    best = told["methods"]["multi-power law"]
    assert abs(best["error"]) < 0.03 * told["measured"] and best["error"] == best["loss"] - told["measured"]
    assert best["interval"][0] < told["measured"] < best["interval"][1]
    assert told["methods"]["last value"]["error"] > 3 * abs(best["error"])
    lr_T, warmup = factors(STEPS)
    end = fast_law(lr_T, warmup, LAW)[-20:].mean()
    assert told["measured"] == pytest.approx(end, rel=0.03)  # neither 99 nor 77 is in it


def test_predicted_and_skipped_losses_change_nothing(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine")
    before = forecast_run(folder, 0.5).to_json()
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace("99.0", "0.01").replace("77.0", "0.02"))
    assert forecast_run(folder, 0.5).to_json() == before


def test_a_length_in_epochs_is_the_one_the_run_derived(tmp_path: Path) -> None:
    from scale.monitor.run_state import RunState

    folder = run_folder(tmp_path / "mine", known=250, train={"epochs": 2})
    assert "does not say how many steps" in scale(folder).stderr
    RunState(run_name="mine", config_hash="", facts={"steps": STEPS}).save(folder / "run_state.json")
    assert forecast_run(folder).whole.steps == STEPS


@pytest.mark.parametrize(
    ("known", "arguments", "said"),
    [
        (400, [], "all 400 steps are known: nothing lies ahead"),
        (250, ["--at", "0.9"], "--at 0.9: is step 360, and 250 of 400 steps are known"),
        (250, ["--at", "1.5"], "--at 1.5: expected a share"),
        (250, ["--at", "0"], "--at 0: expected a share"),
        (250, ["--at", "0.01"], "too few losses before step 4"),
        (250, ["--at", "0.1"], "a forecast needs 24"),
        (40, [], "a forecast needs 24"),
        (0, [], "holds no losses of real steps yet"),
    ],
)
def test_one_line_for_what_cannot_be_forecast(
    tmp_path: Path, known: int, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "mine", known=known)
    assert main(["forecast", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("scale: error: ") and error.count("\n") == 1
    assert not (folder / "plots").exists()


def test_no_run_folder_no_metrics_broken_metrics(tmp_path: Path) -> None:
    assert "not a run folder" in scale(tmp_path).stderr
    folder = run_folder(tmp_path / "mine", known=250)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("{]\n" + text)
    broken = scale(folder)
    assert broken.returncode == 1 and "line 1 is no metrics row" in broken.stderr and broken.stderr.count("\n") == 1
    (folder / "metrics.jsonl").unlink()
    gone = scale(folder)
    assert gone.returncode == 2 and "there is no such file" in gone.stderr and gone.stderr.count("\n") == 1


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", known=250)
    (tmp_path / "file").write_text("")
    done = scale(folder, "--out", tmp_path / "file" / "x.png")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--out" in done.stderr


def test_help_has_examples() -> None:
    done = scale("--help")
    assert (
        done.returncode == 0
        and "scale forecast runs/demo --at 0.5" in done.stdout
        and "with a 90% interval" in " ".join(done.stdout.split())
    )
