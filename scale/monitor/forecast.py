"""The forecast of a run folder: read, told and drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from scale.errors import ScaleError, UsageError
from scale.forecast.curve import Curve, curve_of
from scale.forecast.outlook import Outlook, look_ahead
from scale.monitor.curves import COLOURS
from scale.monitor.mending import config_of
from scale.monitor.records import finite, read_rows
from scale.monitor.run_folder import RunFolder
from scale.monitor.run_state import RunState
from scale.train.schedule import lr_factor, warmup_steps


@dataclass(frozen=True)
class RunForecast:
    """The outlook of a run from its losses up to `known`, and what is known beyond that."""

    name: str
    whole: Curve
    outlook: Outlook

    @property
    def known(self) -> int:
        return self.outlook.curve.last

    @property
    def truth(self) -> float | None:
        """The loss at the end as it was measured; None while the end is not known."""
        value = self.whole.measured(self.whole.steps) if self.whole.last == self.whole.steps else math.nan
        return value if math.isfinite(value) else None

    def to_json(self) -> dict[str, Any]:
        """Numbers of every method; losses in nats per token, errors of fit and past relative, null where unknown."""
        methods = {
            name: {
                "loss": f.loss,
                "interval": [f.lower, f.upper],
                "fit_error": f.error,
                "past_error": f.past,
                "error": None if self.truth is None else f.loss - self.truth,
                "note": f.note or None,
            }
            for name, f in self.outlook.forecasts.items()
        }
        told = {"run": self.name, "known_step": self.known, "steps": self.whole.steps, "window": self.whole.window}
        told |= {"coverage": 0.9, "chosen": self.outlook.chosen, "reason": self.outlook.reason, "measured": self.truth}
        told |= {"left_out": dict(self.outlook.left_out)}
        return finite(told | {"methods": methods})


def read_curve(folder: str | Path) -> Curve:
    """The losses in a run folder, finished, running or dead, and its schedule.

    Raises UsageError if it is no run folder, has no losses, or its length is not known.
    """
    run = RunFolder(Path(folder))
    if not run.config.is_file() and not run.checkpoints.is_dir():
        raise UsageError(f"{folder}: not a run folder (it has no config.yaml)")
    if not run.metrics.is_file():
        raise UsageError(f"{run.metrics}: there is no such file (wait for the first step)")
    config = config_of(run)
    steps = config.train.steps or _planned_steps(run)
    lr_T = np.array([lr_factor(config.schedule, step, steps) for step in range(1, steps + 1)])
    curve = curve_of(read_rows(run.metrics), lr_T, warmup_steps(config.schedule, steps))
    if not len(curve.step_N):
        raise UsageError(f"{run.metrics}: holds no losses of real steps yet (wait for the first ones)")
    return curve


def forecast_run(folder: str | Path, at: float | None = None) -> RunForecast:
    """Forecast the end of a run from all that is known of it, or as if only the share `at` of its steps were known.

    Raises UsageError as `read_curve` and `look_ahead`, and if less than `at` is known.
    """
    whole = read_curve(folder)
    part = whole
    if at is not None:
        if not 0 < at < 1:
            raise UsageError(f"--at {at:g}: expected a share of the steps between 0 and 1, such as 0.5")
        step = round(at * whole.steps)
        if step > whole.last:
            raise UsageError(f"--at {at:g}: is step {step}, and {whole.last} of {whole.steps} steps are known")
        part = whole.until(step)
    if len(part.step_N) == 0 or math.isnan(part.measured(part.last)):
        raise UsageError(f"{folder}: too few losses before step {round((at or 1) * whole.steps)} to forecast from")
    return RunForecast(Path(folder).resolve().name, whole, look_ahead(part))


def draw_forecast(forecast: RunForecast, path: Path) -> Path:
    """A picture: losses so far, the forecast with its band, what came if it is known, and the schedule below."""
    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curve, whole, best = forecast.outlook.curve, forecast.whole, forecast.outlook.best
    above.plot(curve.step_N, curve.loss_N, color=COLOURS[0], alpha=0.25, linewidth=0.8)
    above.plot(curve.bins.step_B, np.exp(curve.bins.log_B), color=COLOURS[0], linewidth=1.8, label="known")
    if whole.last > curve.last:
        later = whole.step_N > curve.last
        above.plot(whole.step_N[later], whole.loss_N[later], color=COLOURS[6], alpha=0.3, linewidth=0.8, label="came")
    above.plot(best.step_M, best.loss_M, color=COLOURS[1], linewidth=1.8, label=f"forecast ({best.method})")
    above.fill_between(best.step_M, best.lower_M, best.upper_M, color=COLOURS[1], alpha=0.2, linewidth=0, label="90%")
    for index, (name, other) in enumerate(forecast.outlook.forecasts.items(), start=2):
        if name != best.method:
            above.plot(other.step_M, other.loss_M, "--", color=COLOURS[index], linewidth=1, label=name)
    shown = np.concatenate([whole.loss_N[whole.step_N > whole.first], best.lower_M, best.upper_M])
    above.set_ylim(shown.min() * 0.97, np.quantile(shown, 0.995) * 1.03)
    above.set_ylabel("loss (nats per token)")
    above.set_title(f"{forecast.name}: step {forecast.known} of {whole.steps}", loc="left", fontsize=11)
    above.legend(frameon=False, fontsize=9)
    below.plot(np.arange(1, whole.steps + 1), whole.lr_T, color=COLOURS[0])
    below.axvline(forecast.known, color=COLOURS[6], linewidth=0.8)
    below.set_ylim(bottom=0)
    below.set_ylabel("learning rate\n(of its peak)")
    below.set_xlabel("step")
    below.xaxis.set_major_formatter(EngFormatter(sep=""))
    for ax in (above, below):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.margins(x=0.01)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise ScaleError(f"{path}: cannot be written: {error.strerror} (choose another place with --out)") from None
    return path


def _planned_steps(run: RunFolder) -> int:
    """Length of a run whose config counts tokens or epochs, as it was derived when the run began."""
    steps = RunState.load(run.run_state).facts.get("steps") if run.run_state.is_file() else None
    if not isinstance(steps, int) or steps < 1:
        raise UsageError(f"{run.run_state}: does not say how many steps the run has (start it, or give train.steps)")
    return steps
