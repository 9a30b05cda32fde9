"""Rows of the forecast benchmark by hand, and runs that no choice was made on."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.forecast import BASELINE, CHOSEN, SHARES, Scored, calibrate, report, rows_of
from benchmarks.forecast_runs import DEVELOPMENT, HELD_OUT
from scale.forecast.methods import METHODS


def scored() -> list[Scored]:
    errors = dict.fromkeys(METHODS, (0.1, 0.1)) | {BASELINE: (0.2, 0.4), CHOSEN: (0.02, 0.1)}
    errors["multi-power law"] = (0.02, 0.04)
    return [
        Scored(run, at, name, errors[name][index], inside=index == 0, score=float(index))
        for index, run in enumerate(("a", "b"))
        for at in SHARES
        for name in errors
    ]


def test_rows_by_hand() -> None:
    rows = {(row.metric, row.provider): row for row in rows_of(scored()) if row.x == 0.5}
    mean = rows["mean absolute error", "multi-power law"]
    assert (mean.median, mean.n, mean.ratio) == (pytest.approx(0.03), 2, pytest.approx(0.1))
    assert rows["coverage of the 90% interval", CHOSEN].median == 0.5
    paired = rows["absolute error", "multi-power law"]
    assert paired.ratio == pytest.approx(0.1) and paired.median == pytest.approx(0.03)


def test_report_and_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(scored(), tmp_path / "forecast.csv")
    assert (tmp_path / "forecast.png").stat().st_size > 5000 and (tmp_path / "forecast.csv").is_file()
    assert f"90% intervals of {CHOSEN}: 3 of 6" in capsys.readouterr().out
    calibrate(scored())
    assert "power law: widening 1.00; mean absolute error 0.1000 at 30%" in capsys.readouterr().out


def test_no_choice_was_made_on_a_scored_run(tmp_path: Path) -> None:
    for key in ("name", "seed", "lr"):
        assert not {getattr(r, key) for r in DEVELOPMENT} & {getattr(r, key) for r in HELD_OUT}
    assert len(HELD_OUT) >= 12 and len({r.name for r in HELD_OUT}) == len(HELD_OUT)
    for recipe in (*DEVELOPMENT, *HELD_OUT):
        assert recipe.config(tmp_path).train.steps == recipe.steps


def test_providers_are_the_methods() -> None:
    assert BASELINE in METHODS and CHOSEN not in METHODS
