"""`scale forecast`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale.errors import EXIT_OK

if TYPE_CHECKING:
    from scale.monitor.forecast import RunForecast

EXAMPLES = """\
examples:
  scale forecast runs/demo
  scale forecast runs/demo --at 0.5 --out half.png
  scale forecast runs/demo --at 0.3 --json
"""


def add_commands(verbs: Any) -> None:
    """Add the verb to a parser."""
    forecast = verbs.add_parser(
        "forecast",
        help="the loss at the end of a run, from its first part",
        description="Forecast the training loss at the end of a run's schedule, with a 90% interval, from the losses so far: "
        "of a running, dead or (with --at) finished run. Nothing in the run folder is changed but the picture.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    forecast.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    forecast.add_argument("--json", action="store_true", help="print JSON")
    forecast.add_argument(
        "--at", type=float, metavar="FRACTION", help="use this fraction of the steps only; a finished run scores it"
    )
    forecast.add_argument("--out", type=Path, metavar="PNG", help="the picture (default: RUN/plots/forecast.png)")
    forecast.set_defaults(run=_forecast)


def _forecast(args: argparse.Namespace) -> int:
    from scale.files import refuse_same_place
    from scale.monitor.forecast import draw_forecast, forecast_run
    from scale.monitor.run_folder import RunFolder

    run = RunFolder(args.run_folder)
    if args.out is not None:
        refuse_same_place([run.config, run.run_state, run.metrics, run.checkpoints, run.model], args.out)
    forecast = forecast_run(args.run_folder, args.at)
    picture = draw_forecast(forecast, args.out or args.run_folder / "plots" / "forecast.png")
    if args.json:
        print(json.dumps(forecast.to_json() | {"picture": str(picture)}, indent=2))
    else:
        _print(forecast)
        print(picture)
    return EXIT_OK


def _print(forecast: RunForecast) -> None:
    from rich.console import Console
    from rich.table import Table

    outlook, truth, console = forecast.outlook, forecast.truth, Console()
    steps, window = forecast.whole.steps, forecast.whole.window
    head = f"{forecast.name}: loss at step {steps} (average of the last {window}), from step {forecast.known}"
    columns = ["method", "forecast", "90% interval", "fit error"]
    table = Table(*columns, *([] if truth is None else ["error"]), title=head, title_justify="left")
    for name, said in outlook.forecasts.items():
        cells = [f"{said.loss:.4f}", f"{said.lower:.4f} to {said.upper:.4f}", f"{said.error:.2%}"]
        cells += [] if truth is None else [f"{said.loss - truth:+.4f}"]
        table.add_row(f"> {name}" if name == outlook.chosen else f"  {name}", *cells)
    console.print(table)
    lines = [f"> {outlook.chosen}: {outlook.reason}"]
    lines += [f"{said.method}: {said.note}" for said in outlook.forecasts.values() if said.note]
    lines += [f"{name}: left out: {why}" for name, why in outlook.left_out.items()]
    if truth is not None:
        inside = "inside" if outlook.best.lower <= truth <= outlook.best.upper else "outside"
        lines.append(f"measured: {truth:.4f}, {inside} the interval")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
