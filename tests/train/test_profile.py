import json

import pytest
import torch

from scale.config.run import ProfileConfig
from scale.errors import UsageError
from scale.train.profile import StepProfiler
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


def test_a_memory_snapshot_without_cuda_is_refused(tmp_path):
    with pytest.raises(UsageError, match="need CUDA"):
        StepProfiler(ProfileConfig(steps="2", memory=True), tmp_path, torch.device("cpu"))
