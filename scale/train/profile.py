"""torch profiler trace and CUDA memory snapshot of chosen steps."""

from __future__ import annotations

from pathlib import Path

import torch

from scale.config.run import ProfileConfig
from scale.errors import ScaleError, UsageError


class StepProfiler:
    """Call `before(step)` and `after(step)` around each step, and `finish` where the run ends; files appear after the last
    traced step, or at the end of a run that stops within the range.

    `trace_FIRST-LAST.json` opens in ui.perfetto.dev, `memory_FIRST-LAST.pickle` at pytorch.org/memory_viz. They are named by
    the steps that were traced.
    """

    def __init__(self, config: ProfileConfig, folder: Path, device: torch.device):
        if config.memory and device.type != "cuda":
            raise UsageError(f"profile.memory = true: memory snapshots need CUDA, this run is on {device.type}")
        self.config, self.folder = config, folder
        self.first, self.last = config.bounds()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self.traced: list[int] = []
        self.running = False

    def before(self, step: int) -> None:
        """Start at the first step (or, after a resume, at the first one inside the range)."""
        if not self.running and self.first <= step <= self.last:
            if self.config.memory:
                torch.cuda.memory._record_memory_history()
            self.profiler.start()
            self.running = True

    def after(self, step: int) -> Path | None:
        """Write the files after the last step; returns the trace. Raises ScaleError if it cannot be written."""
        if not self.running:
            return None
        self.traced.append(step)
        return self.finish() if step >= self.last else None

    def finish(self) -> Path | None:
        """Write what was traced so far; None if nothing was. Raises ScaleError if it cannot be written."""
        if not self.running:
            return None
        self.running = False
        self.profiler.stop()
        if not self.traced:
            return None
        name = f"{self.traced[0]}-{self.traced[-1]}"
        trace = self.folder / f"trace_{name}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(str(trace))
            if self.config.memory:
                torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_{name}.pickle"))
        except OSError as error:
            raise ScaleError(f"{trace}: cannot be written: {error.strerror or error}") from None
        finally:
            if self.config.memory:
                torch.cuda.memory._record_memory_history(enabled=None)
        return trace
