"""Lines where there is no terminal, a bar where there is one: what fits at each width, and the time that is left."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from scale.monitor.progress import DROPPED_FIRST, Progress, facts_table, summary
from scale.monitor.recorder import RunRecorder
from scale.monitor.records import Metrics
from scale.monitor.run_folder import RunFolder
from scale.protocols import StepReport
from tests.monitor.progress_captures import WIDTHS, Clock, bar, captures, followed, row

ROOT = Path(__file__).parents[2]


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
    assert lines[0] == "step 1/2,000  loss 2.5000  lr 3.00e-04  tok/s 4,096  MFU 41.2%  mem 3.0GiB  left --:--"
    assert "val 2.7500@5" in lines[2] and lines[2].endswith("left 33:05")
    assert lines[-1].startswith("completed: step 30/2,000  loss 2.4985") and "left" not in lines[-1]


def test_lines_of_a_long_run_come_once_a_minute() -> None:
    text = io.StringIO()
    followed(Console(file=text), Clock(), last=3600)  # half an hour
    lines = text.getvalue().splitlines()
    at = [int(line.split("/")[0].removeprefix("step ").replace(",", "")) / 120 for line in lines]
    assert sum(minutes < 10 for minutes in at) == 60 and 20 <= sum(minutes > 10 for minutes in at) <= 24


def test_what_is_not_known_is_left_out_and_skips_are_said() -> None:
    text = io.StringIO()
    progress = Progress(Console(file=text))
    progress.start({})
    progress.log({**row(1, skipped="loss [spike]"), "mfu": None, "memory_bytes": None, "loss": None})
    assert text.getvalue() == "step 1  lr 3.00e-04  tok/s 4,096  skipped: loss [spike]\n"


def test_the_predicted_share_and_the_phase_are_shown_where_prediction_is_on():
    made = row(100, kind="correct", mfu=0.4, memory_bytes=None)
    assert "predicted" not in summary(made, None)
    said = row(100, kind="correct", mfu=0.4, memory_bytes=None, prediction={"ledger": {"full": 69, "predicted": 31}})
    assert summary(said, None) == "loss 2.4950  lr 3.00e-04  tok/s 4,096  MFU 40.0%  predicted 31%  correct"


def test_a_counted_step_has_neither_loss_nor_speed():
    report = StepReport(100, "predict", math.nan, math.nan, 3e-4, 0, 0, 0, 0, 0, 1e-6)
    report.prediction = {"phase": "predict", "ledger": {"full": 50, "predicted": 50}}
    assert summary(Metrics(Path("unused")).row(report, None, {"mfu": 0.0}), (2.75, 50)) == (
        "val 2.7500@50  lr 3.00e-04  predicted 50%  predict"
    )


@pytest.mark.parametrize("width", [*WIDTHS, 20, 40, 200])
def test_steps_bar_and_time_left_come_before_numbers_at_every_width(width: int) -> None:
    shown = bar(width)
    assert len(shown) <= width and "\n" not in shown
    assert shown.startswith("1,234/20,000") and ("left 2:36:23" in shown or width < 26)
    if width >= 40:
        assert re.search(r"20,000 [\u2501\u2578]", shown), "a bar"
    there = [name for name in reversed(DROPPED_FIRST) if f" {name} " in shown]
    assert (
        there
        == [name for name in reversed(DROPPED_FIRST) if name not in ("predicted", "phase", "skipped")][: len(there)]
    )
    assert {60: 1, 80: 3, 120: 6, 200: 7}.get(width, len(there)) == len(there)


def test_a_bar_without_an_end_has_neither_bar_nor_time() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80, color_system=None)
    progress = Progress(console, Clock())
    progress.start({})
    progress.log(row(3))
    assert "left" not in progress._line(0.0) and not progress._left(0.0)
    progress.finish("stopped")
    assert "\x1b[?25h" in text.getvalue(), "the cursor is back"


def test_a_resumed_run_counts_its_own_steps_alone() -> None:
    """1,000 steps were there; ten of .5 s make 9,990 more, whatever the first one and the evaluation before it took."""
    clock = Clock()
    progress = Progress(Console(file=io.StringIO()), clock)
    progress.start({"steps": 11_000, "step": 1000})
    clock.now += 500.0
    for step in range(1001, 1011):
        progress.log(row(step))
        left = progress._left(clock.now)
        clock.now += 0.5
    assert left == "left 1:23:15"


def test_an_evaluation_before_the_first_step_is_no_step() -> None:
    progress = Progress(Console(file=io.StringIO()), Clock())
    progress.start({"steps": 10, "step": 0})
    progress.log({**row(1, val=9.0), "step": 0, "loss": None})
    assert progress._left(0.0) == "left --:--"


def test_an_mfu_above_one_is_left_out_and_explained_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = io.StringIO()
    progress = Progress(Console(file=text, width=40))
    progress.start({"steps": 10})
    for step in (1, 2, 3):
        progress.log(row(step, mfu=1.79, val=2.0))
    shown = text.getvalue()
    assert shown.count("MFU") == 1 and "179% here" in shown and "machine was busy" in shown
    recorder = RunRecorder(RunFolder(tmp_path), [], {}, lambda n: 1e6, peak_flops=1e9)
    report = SimpleNamespace(seq_len=8, tokens=4096, seconds=1.0)
    assert [recorder._extra(report)["mfu"] for _ in range(2)] == [None, None]
    assert capsys.readouterr().out.count("MFU") == 1 and len(recorder.state.events) == 1
    report.seconds = 8.0
    assert recorder._extra(report)["mfu"] == pytest.approx(0.512)


SHOW = """
import itertools
from scale.monitor.progress import Progress
from tests.monitor.progress_captures import row
progress = Progress(clock=itertools.count().__next__)
progress.start({"steps": 30, "step": 0})
for step in range(1, 31):
    progress.log(row(step, val=2.0 if step == 20 else None))
progress.finish("completed")
"""


@pytest.mark.parametrize("colours", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}])
def test_a_pipe_gets_whole_lines_without_control_characters(colours: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "30"} | colours,
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(r"[^\x20-\x7e\n]", done.stdout) and "mem 3.0GiB  left" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("completed: step 30/30")


def test_a_terminal_gets_one_row_that_is_drawn_over() -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", SHOW],
        cwd=ROOT,
        stdout=theirs,
        stdin=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    assert child.wait() == 0
    assert b"\x1b[?25l" in seen and b"\x1b[?25h" in seen, "the cursor is hidden, and back"
    assert b"30/30" in seen and b"step 20/30" not in seen and seen.rstrip().endswith(b"completed: step 30/30")


def test_the_page_shows_what_is_shown() -> None:
    assert captures() in (ROOT / "docs" / "progress.md").read_text()
    assert "python -m tests.monitor.progress_captures" in (ROOT / "docs" / "progress.md").read_text()


def test_facts_table() -> None:
    text = io.StringIO()
    facts = {"parameters": 123456789, "MFU peak": 0.123456, "precision": "bf16 [auto: CUDA]", "compile": True}
    facts_table(facts, Console(file=text, width=60))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert [line.split("  ")[0] for line in lines] == list(facts)
    assert [line.split("  ")[-1].strip() for line in lines] == ["123,456,789", "0.1235", "bf16 [auto: CUDA]", "True"]
