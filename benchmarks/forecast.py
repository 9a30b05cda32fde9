"""How well the end of a run is forecast from its first part: scored on runs that no choice was made on.

    python benchmarks/forecast.py                   # trains 12 runs (about 5 minutes of one free CPU core), scores them
    python benchmarks/forecast.py --work /data/fr   # where the runs are kept; those that are finished are not trained again
    python benchmarks/forecast.py --calibrate       # on the development runs instead: the numbers of interval.py

From 30%, 50% and 70% of the steps of each run every method forecasts the training loss at its end. What the columns of
forecast.csv mean is in docs/forecast.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run by path: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.common import RESULTS, Row, line_plot, print_table, quantiles, summarise, this_machine, write_csv
from benchmarks.forecast_runs import DEVELOPMENT, HELD_OUT, Recipe, train
from scale.forecast.interval import conformal_quantile
from scale.forecast.methods import METHODS
from scale.monitor.forecast import forecast_run

SHARES = (0.3, 0.5, 0.7)
BASELINE = "last value"
CHOSEN = "scale forecast"
"""The method that `scale forecast` chooses, run by run."""


@dataclass(frozen=True)
class Scored:
    """One forecast of one run against what came, in nats per token."""

    run: str
    at: float
    method: str
    error: float
    inside: bool
    score: float
    """|error of the log| in units of the spread: what widening is chosen by."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/forecast.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    work = Path(tempfile.gettempdir()) / "forecast_runs"
    parser.add_argument("--work", type=Path, default=work, help=f"folder of the runs (default {work})")
    parser.add_argument("--calibrate", action="store_true", help="widening of intervals by the development runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "forecast.csv", help="CSV; the plot lies beside it")
    return parser.parse_args(arguments)


def score(folder: Path) -> list[Scored]:
    """All methods, and the chosen one, at each of `SHARES`."""
    scored = []
    for at in SHARES:
        forecast = forecast_run(folder, at)
        if forecast.truth is None:
            raise SystemExit(f"{folder}: the run is not finished")
        for name, method in [*((name, name) for name in METHODS), (CHOSEN, forecast.outlook.chosen)]:
            said = forecast.outlook.forecasts[method]
            off = abs(math.log(said.loss / forecast.truth)) / said.spread
            inside = said.lower <= forecast.truth <= said.upper
            scored.append(Scored(folder.name, at, name, abs(said.loss - forecast.truth), inside, off))
    return scored


def rows_of(scored: Sequence[Scored]) -> list[Row]:
    """Absolute errors (quantiles over runs), their mean, and how often the interval held the loss."""
    rows: list[Row] = []
    providers = list(dict.fromkeys(s.method for s in scored))
    for at in SHARES:
        of = {name: [s for s in scored if s.method == name and s.at == at] for name in providers}
        config = f"{len(of[BASELINE])} held-out runs"
        errors = {name: [s.error for s in of[name]] for name in providers}
        rows += summarise("forecast", "absolute error", "nats per token", at, config, errors, BASELINE)
        for metric, unit, value in (
            ("mean absolute error", "nats per token", lambda found: float(np.mean([s.error for s in found]))),
            ("coverage of the 90% interval", "share", lambda found: float(np.mean([s.inside for s in found]))),
        ):
            measured = {name: [value(of[name])] for name in providers}
            for row in summarise("forecast", metric, unit, at, config, measured, BASELINE):
                rows.append(Row(**(vars(row) | {"n": len(of[BASELINE])})))
    return rows


def calibrate(scored: Sequence[Scored]) -> None:
    """Print what `WIDENING` should be, and the errors that priors are chosen by."""
    for name in METHODS:
        of = [s for s in scored if s.method == name]
        errors = [np.mean([s.error for s in of if s.at == at]) for at in SHARES]
        shown = ", ".join(f"{error:.4f} at {at:.0%}" for at, error in zip(SHARES, errors, strict=True))
        print(f"{name}: widening {conformal_quantile([s.score for s in of]):.2f}; mean absolute error {shown}")


def report(scored: Sequence[Scored], out: Path) -> None:
    rows = rows_of(scored)
    write_csv(out, rows, this_machine("cpu"))
    errors = [row for row in rows if row.metric == "absolute error"]
    line_plot(out.with_suffix(".png"), errors, "Forecasts of the loss at the end", "share of the run that is known")
    for metric in dict.fromkeys(row.metric for row in rows):
        print_table([row for row in rows if row.metric == metric], metric)
    inside = [s.inside for s in scored if s.method == CHOSEN]
    print(f"90% intervals of {CHOSEN}: {sum(inside)} of {len(inside)} held the loss")
    low, middle, high = quantiles([s.error for s in scored if s.method == CHOSEN])
    print(f"errors of {CHOSEN}: {middle:.4f} ({low:.4f}..{high:.4f}) nats per token")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    recipes: Sequence[Recipe] = DEVELOPMENT if args.calibrate else HELD_OUT
    folders = [train(recipe, args.work) for recipe in recipes]
    scored = [s for folder in folders for s in score(folder)]
    if args.calibrate:
        calibrate(scored)
    else:
        report(scored, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
