"""What a person sees while a run trains: a bar in a terminal, a line now and then in a file or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

INTERVAL, LATER_INTERVAL = 10.0, 60.0
"""Seconds between two lines where there is no terminal, in the first `EARLY` seconds and after them."""
EARLY = 600.0
NARROWEST = 8
"""Columns of the bar before numbers give way."""
DROPPED_FIRST = ("elapsed", "skipped", "mem", "MFU", "lr", "phase", "predicted", "tok/s", "val", "loss")
"""Numbers that give way where a terminal is narrow, in this order; then the bar and the time left, steps never. Why a step is
skipped is said above the bar as well."""


def output_console() -> Console:
    """Standard output. Colours and moving the cursor only where it is a terminal, whatever FORCE_COLOR says."""
    return Console(force_terminal=sys.stdout.isatty())


class Progress:
    """A Monitor. `facts["steps"]` is the length of the run, `facts["step"]` where this process begins; without the former
    there is neither a bar nor a time that is left."""

    name = "progress"

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.console = console or output_console()
        self.clock = clock
        self._steps: int | None = None
        self._live: Live | None = None
        self._begun: float | None = None
        self._first: tuple[int, float] | None = None
        """The first step that this process made, and when it was done: compiling is over, and the speed is known from here."""
        self._step = self._before = 0
        self._last_line: float | None = None
        self._numbers: dict[str, str] = {}
        self._val: tuple[float, int] | None = None
        self._said_mfu = False

    def start(self, facts: Mapping[str, Any]) -> None:
        self._steps, self._step = facts.get("steps"), facts.get("step", 0)
        self._before, self._begun = self._step, self.clock()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(get_renderable=lambda: self, console=self.console, refresh_per_second=4)
            self._live.start()

    def log(self, row: Mapping[str, Any]) -> None:
        now = self.clock()
        self._step = row["step"]
        if self._first is None and self._step > self._before:
            self._first = (self._step, now)
        scored = row["val_loss"] is not None
        if scored:
            self._val = (row["val_loss"], row["step"])
        self._explain(row["mfu"])
        self._numbers = numbers(row, self._val)
        if self._live is None and (self._last_line is None or scored or now - self._last_line >= self._interval(now)):
            self._last_line = now
            self._print(self._line(now))

    def finish(self, status: str) -> None:
        shown = self._line(None)
        if self._live is not None:  # the row stays, with its numbers
            self._live.stop()
            self._live, shown = None, f"step {self._count()}"
        self._print(f"{status}: {shown}" if self._numbers else status)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One row of the width there is."""
        now, width = self.clock(), options.max_width
        ends = {"step": self._count(), "left": self._left(now)}
        shown = self._numbers | self._elapsed(now)
        used = lambda: sum(len(text) + 2 for text in [*ends.values(), *shown.values()] if text) - 2  # noqa: E731
        room = NARROWEST + 1 if self._steps else 0
        for name in DROPPED_FIRST:
            if used() + room > width:
                shown.pop(name, None)
        if used() > width:
            ends["left"] = ""
        row = Table.grid(padding=(0, 0))
        cells: list[Any] = [Text(ends["step"], style="bold")]
        bar = width - used() - 1
        if self._steps and bar >= 1:
            cells += [Text(" "), ProgressBar(self._steps, self._step, width=bar)]
        rest = "  ".join(text for text in [ends["left"], *shown.values()] if text)
        cells.append(Text(f"  {rest}" if rest else ""))
        for _ in cells:
            row.add_column(no_wrap=True)
        row.add_row(*cells)
        yield row

    def _count(self) -> str:
        return f"{self._step:,}" + (f"/{self._steps:,}" if self._steps else "")

    def _left(self, now: float) -> str:
        """Time to the last step, at the mean speed of this process since its first step."""
        if not self._steps or self._step >= self._steps:
            return ""
        if self._first is None or self._step <= self._first[0]:
            return "left --:--"
        step, since = self._first
        return f"left {_duration((now - since) / (self._step - step) * (self._steps - self._step))}"

    def _elapsed(self, now: float) -> dict[str, str]:
        return {} if self._begun is None else {"elapsed": f"elapsed {_duration(now - self._begun)}"}

    def _line(self, now: float | None) -> str:
        left = "" if now is None else self._left(now)
        return "  ".join(text for text in [f"step {self._count()}", *self._numbers.values(), left] if text)

    def _interval(self, now: float) -> float:
        return INTERVAL if self._begun is None or now - self._begun < EARLY else LATER_INTERVAL

    def _explain(self, mfu: float | None) -> None:
        if mfu is not None and mfu > 1 and not self._said_mfu:
            self._said_mfu = True
            self._print(WITHOUT_MFU.format(mfu))

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


WITHOUT_MFU = (
    "MFU is left out where it is above 100% ({:.0%} here): the peak was measured too low, as the machine was busy"
)


def numbers(row: Mapping[str, Any], val: tuple[float, int] | None) -> dict[str, str]:
    """The numbers of one step that a person follows, as shown, by name; what the row does not know is left out. `val`: the last
    held-out loss and its step."""
    made = not row["was_predicted"]  # a step that is only counted has neither a loss nor a speed
    mfu = row["mfu"] if made and row["mfu"] is not None and row["mfu"] <= 1 else None
    parts = [
        ("loss", row["loss"] if made else None, "{:.4f}"),
        ("val", None if val is None else val[0], f"{{:.4f}}@{0 if val is None else val[1]:,}"),
        ("lr", row["learning_rate"], "{:.2e}"),
        ("tok/s", row["tokens_per_second"] if made else None, "{:,.0f}"),
        ("MFU", mfu, "{:.1%}"),
        ("mem", None if row["memory_bytes"] is None else row["memory_bytes"] / 2**30, "{:.1f}GiB"),
        ("predicted", _predicted_share(row), "{:.0%}"),
    ]
    shown = {name: f"{name} {form.format(value)}" for name, value, form in parts if value is not None}
    if row["phase"] in ("correct", "predict"):
        shown["phase"] = row["phase"]
    if row["skipped"] is not None:
        shown["skipped"] = f"skipped: {row['skipped']}"
    return shown


def summary(row: Mapping[str, Any], val: tuple[float, int] | None) -> str:
    """`numbers` in one line."""
    return "  ".join(numbers(row, val).values())


def _predicted_share(row: Mapping[str, Any]) -> float | None:
    """Of the steps so far; None where prediction is off."""
    ledger = row["ledger"]
    return ledger["predicted"] / row["step"] if ledger and row["step"] else None


def _duration(seconds: float) -> str:
    """01:05, 12:00:05, 3d04h."""
    whole = timedelta(seconds=round(seconds))
    return f"{whole.days}d{whole.seconds // 3600:02}h" if whole.days else str(whole).removeprefix("0:")


def facts_table(facts: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the derived numbers of a run, one per line."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(str(name)), Text(_number(value)))
    (console or output_console()).print(table)


def _number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return str(value)
