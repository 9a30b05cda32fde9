import json
from types import SimpleNamespace

import pytest
import torch

from scale.config.run import ProfileConfig
from scale.errors import ScaleError, UsageError
from scale.train.loop import Loop, LoopSettings
from scale.train.profile import StepProfiler
from scale.train.stop import StopSignal
from tests.train.parts import Numbers, stepper


def test_a_trace_of_the_chosen_steps_is_written(tmp_path):
    profiler, made, source = (
        StepProfiler(ProfileConfig(steps="2-3"), tmp_path, torch.device("cpu")),
        stepper(),
        Numbers(),
    )
    written = []
    for step in range(1, 6):
        profiler.before(step)
        made.step(source)
        written.append(profiler.after(step))
    assert [w is not None for w in written] == [False, False, True, False, False]
    events = json.loads((tmp_path / "trace_2-3.json").read_text())["traceEvents"]
    names = [e.get("name") for e in events]
    assert any("Optimizer.step#AdamW.step" in str(n) for n in names)
    assert sum(n == "Optimizer.step#AdamW.step" for n in names) == 2


def profiled(tmp_path, end):
    """A loop that traces steps 2 to 4 and ends as `end(loop, stop)` says, called after each step."""
    events, stop = [], StopSignal()
    notes = SimpleNamespace(step=lambda *a: None, event=lambda kind, text: events.append(text))
    profiler = StepProfiler(ProfileConfig(steps="2-4"), tmp_path, torch.device("cpu"))
    made = Loop(
        stepper(), Numbers(), LoopSettings(6, 9, 9), notes, lambda s, v: None, lambda: end(made, stop), None, profiler
    )
    return made, stop, events


def traced(path):
    names = [e.get("name") for e in json.loads(path.read_text())["traceEvents"]]
    return names.count("Optimizer.step#AdamW.step")


def test_a_run_that_stops_within_the_range_writes_what_was_traced(tmp_path):
    made, stop, events = profiled(tmp_path, lambda loop, stop: loop.done == 3 and setattr(stop, "reason", "SIGTERM"))
    assert made.run(stop) == "stopped" and any("trace_2-3.json" in text for text in events)
    made.profiler = StepProfiler(ProfileConfig(steps="2-4"), tmp_path, torch.device("cpu"))
    made.check_saves = lambda: None
    assert made.run(StopSignal()) == "completed"
    assert {p.name: traced(p) for p in tmp_path.iterdir()} == {"trace_2-3.json": 2, "trace_4-4.json": 1}


def test_a_run_that_fails_within_the_range_writes_what_was_traced(tmp_path):
    def fail(loop, stop):
        if loop.done == 3:
            raise ScaleError("disk full")

    made, stop, events = profiled(tmp_path, fail)
    with pytest.raises(ScaleError, match="disk full"):
        made.run(stop)
    assert traced(tmp_path / "trace_2-3.json") == 2 and "trace_2-3.json" in events[0]


def test_a_memory_snapshot_without_cuda_is_refused(tmp_path):
    with pytest.raises(UsageError, match="need CUDA"):
        StepProfiler(ProfileConfig(steps="2", memory=True), tmp_path, torch.device("cpu"))
