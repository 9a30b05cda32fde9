"""What a person sees while a run trains: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

INTERVAL = 10.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """A Monitor. `facts["steps"]` is the length of the run; without it the bar has no end."""

    name = "progress"

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.console = console or Console()
        self.clock = clock
        self._steps: int | None = None
        self._bar: bars.Progress | None = None
        self._task: bars.TaskID | None = None
        self._last_line: float | None = None
        self._shown = ""
        self._val_loss: float | None = None

    def start(self, facts: Mapping[str, Any]) -> None:
        self._steps = facts.get("steps")
        if self.console.is_terminal:
            self._bar = bars.Progress(
                bars.TextColumn("[bold]{task.completed:,}[/]/{task.total:,}" if self._steps else "{task.completed:,}"),
                bars.BarColumn(bar_width=None),
                bars.TextColumn("{task.fields[numbers]}", markup=False),
                bars.TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
                expand=True,
            )
            self._bar.start()

    def log(self, row: Mapping[str, Any]) -> None:
        scored = row["val_loss"] is not None
        if scored:
            self._val_loss = row["val_loss"]
        numbers = summary(row, self._val_loss)
        if self._bar is not None:
            self._advance(self._bar, row["step"], numbers)
            return
        self._shown = f"step {row['step']:,}" + (f"/{self._steps:,}" if self._steps else "") + f"  {numbers}"
        now = self.clock()
        if self._last_line is None or scored or now - self._last_line >= INTERVAL:
            self._last_line = now
            self._print(self._shown)

    def finish(self, status: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._print(f"{status}: {self._shown}" if self._shown else status)

    def _advance(self, bar: bars.Progress, step: int, numbers: str) -> None:
        if self._task is None:  # a resumed run begins in the middle: steps done before must not count as speed
            self._task = bar.add_task("", total=self._steps, completed=step, numbers=numbers)
        else:
            bar.update(self._task, completed=step, numbers=numbers)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def summary(row: Mapping[str, Any], val_loss: float | None) -> str:
    """The numbers of one step that a person follows; what the row does not know is left out."""
    made = not row["was_predicted"]  # a step that is only counted has neither a loss nor a speed
    parts = [
        ("loss", row["loss"] if made else None, "{:.4f}"),
        ("val", val_loss, "{:.4f}"),
        ("lr", row["learning_rate"], "{:.2e}"),
        ("tok/s", row["tokens_per_second"] if made else None, "{:,.0f}"),
        ("MFU", row["mfu"] if made else None, "{:.1%}"),
        ("mem", None if row["memory_bytes"] is None else row["memory_bytes"] / 2**30, "{:.1f}GiB"),
        ("predicted", _predicted_share(row), "{:.0%}"),
    ]
    shown = [f"{name} {form.format(value)}" for name, value, form in parts if value is not None]
    if row["phase"] in ("correct", "predict"):
        shown.append(row["phase"])
    if row["skipped"] is not None:
        shown.append(f"skipped: {row['skipped']}")
    return "  ".join(shown)


def _predicted_share(row: Mapping[str, Any]) -> float | None:
    """Of the steps so far; None where prediction is off."""
    ledger = row["ledger"]
    return ledger["predicted"] / row["step"] if ledger and row["step"] else None


def facts_table(facts: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the derived numbers of a run, one per line."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(str(name)), Text(_number(value)))
    (console or Console()).print(table)


def _number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return str(value)
