"""The progress line as a terminal of some width, or a pipe, shows it: `python -m tests.monitor.progress_captures` prints the
captures of docs/progress.md."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from scale.monitor.progress import Progress
from scale.monitor.records import Metrics
from scale.protocols import Score, StepReport

WIDTHS = (60, 80, 120)
STEPS = 20_000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def row(step: int, val: float | None = None, **changes: Any) -> dict[str, Any]:
    """Metrics of a step of .5 s."""
    report = StepReport(step, "full", 2.5 - step / STEPS, 1.0, 3e-4, 2048, 1, 1, 2048, 2048, 0.5)
    for name in ("skipped", "kind", "prediction"):
        if name in changes:
            setattr(report, name, changes.pop(name))
    extra = {"mfu": 0.4123, "memory_bytes": 3 * 2**30, **changes}
    return Metrics(Path("unused")).row(report, None if val is None else Score(val, 1), extra)


def followed(console: Console, clock: Clock, first: int = 1, last: int = 1234, **facts: int) -> Progress:
    """Steps of .5 s, the held-out loss every thousand."""
    progress = Progress(console, clock)
    progress.start({"steps": STEPS, **facts})
    for step in range(first, last + 1):
        clock.now += 0.5
        progress.log(row(step, val=2.4567 if step % 1000 == 0 else None))
    return progress


def bar(width: int, last: int = 1234) -> str:
    """The row that a terminal of that width shows."""
    text = io.StringIO()
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    progress = followed(console, Clock(), last=last)
    Console(file=text, width=width, color_system=None).print(progress)
    progress.finish("completed")
    return text.getvalue().rstrip("\n")


def lines() -> str:
    """What a pipe or a file gets."""
    text = io.StringIO()
    followed(Console(file=text), Clock(), last=60).finish("stopped")
    return text.getvalue().rstrip("\n")


def captures() -> str:
    """All of them, as docs/progress.md shows them."""
    shown = [f"```text\n{'.' * width} {width} columns\n{bar(width)}\n```" for width in WIDTHS]
    return "\n\n".join([*shown, f"```text\n{lines()}\n```"])


if __name__ == "__main__":
    print(captures())
