"""Lines where there is no terminal, a bar where there is one."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from scale.monitor.progress import INTERVAL, Progress, facts_table, summary
from scale.monitor.records import Metrics
from scale.protocols import Score, StepReport


def row(step: int, val: float | None = None, skipped: str | None = None) -> dict:
    report = StepReport(step, "full", 2.5, 1.0, 3e-4, 2048, 1, 1, 2048, 2048, 0.5, skipped=skipped)
    extra = {"mfu": 0.4123, "memory_bytes": 3 * 2**30}
    return Metrics(Path("unused")).row(report, None if val is None else Score(val, 1), extra)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_now_and_then_and_at_every_evaluation() -> None:
    text, clock = io.StringIO(), Clock()
    progress = Progress(Console(file=text, width=40), clock)
    progress.start({"steps": 2000})
    for step in range(1, 31):
        clock.now = float(step)
        progress.log(row(step, val=2.75 if step == 5 else None))
    progress.finish("completed")
    lines = text.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == [
        "step 1/2,000",
        "step 5/2,000",
        "step 15/2,000",
        "step 25/2,000",
    ]
    assert INTERVAL == 10
    assert lines[0] == "step 1/2,000  loss 2.5000  lr 3.00e-04  tok/s 4,096  MFU 41.2%  mem 3.0GiB"
    assert "val 2.7500" in lines[2] and lines[-1].startswith("completed: step 30/2,000  loss 2.5000")
    assert "\x1b" not in text.getvalue()


def test_what_is_not_known_is_left_out_and_skips_are_said() -> None:
    text = io.StringIO()
    progress = Progress(Console(file=text))
    progress.start({})
    progress.log({**row(1, skipped="loss [spike]"), "mfu": None, "memory_bytes": None, "loss": None})
    assert text.getvalue() == "step 1  lr 3.00e-04  tok/s 4,096  skipped: loss [spike]\n"


def test_the_predicted_share_and_the_phase_are_shown_where_prediction_is_on():
    report = StepReport(100, "correct", 2.5, 1.0, 3e-4, 2048, 1, 1, 2048, 2048, 0.5)
    assert "predicted" not in summary(Metrics(Path("unused")).row(report, None, {}), None)
    report.prediction = {"phase": "correct", "ledger": {"full": 69, "predicted": 31}}
    shown = summary(Metrics(Path("unused")).row(report, None, {"mfu": 0.4}), None)
    assert shown == "loss 2.5000  lr 3.00e-04  tok/s 4,096  MFU 40.0%  predicted 31%  correct"


def test_a_counted_step_has_neither_loss_nor_speed():
    report = StepReport(100, "predict", math.nan, math.nan, 3e-4, 0, 0, 0, 0, 0, 1e-6)
    report.prediction = {"phase": "predict", "ledger": {"full": 50, "predicted": 50}}
    assert summary(Metrics(Path("unused")).row(report, None, {"mfu": 0.0}), 2.75) == (
        "val 2.7500  lr 3.00e-04  predicted 50%  predict"
    )


@pytest.mark.parametrize("facts", [{"steps": 1000}, {}])
def test_a_bar_in_a_terminal(facts: dict) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=160, color_system=None)
    progress = Progress(console)
    progress.start(facts)
    for step in range(501, 601):  # a resumed run
        progress.log(row(step, val=2.75 if step == 550 else None))
    assert progress._bar is not None
    task = progress._bar.tasks[0]
    assert task.completed == 600 and task.total == facts.get("steps")
    progress.finish("completed")
    shown = text.getvalue()
    for part in ("600", "loss 2.5000", "val 2.7500", "lr 3.00e-04", "tok/s 4,096", "MFU 41.2%", "mem 3.0GiB"):
        assert part in shown
    assert "\x1b[?25h" in shown  # the cursor is back


def test_facts_table() -> None:
    text = io.StringIO()
    facts = {"parameters": 123456789, "MFU peak": 0.123456, "precision": "bf16 [auto: CUDA]", "compile": True}
    facts_table(facts, Console(file=text, width=60))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert [line.split("  ")[0] for line in lines] == list(facts)
    assert [line.split("  ")[-1].strip() for line in lines] == ["123,456,789", "0.1235", "bf16 [auto: CUDA]", "True"]
