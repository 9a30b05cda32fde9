"""torch profiler trace and CUDA memory snapshot of chosen steps."""

from __future__ import annotations

from pathlib import Path

import torch

from scale.config.run import ProfileConfig
from scale.errors import UsageError


class StepProfiler:
    """Call `before(step)` and `after(step)` around each step; files appear after the last traced one.

    `trace_FIRST-LAST.json` opens in ui.perfetto.dev, `memory_FIRST-LAST.pickle` at pytorch.org/memory_viz.
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
        self.running = False

    def before(self, step: int) -> None:
        """Start at the first step (or, after a resume, at the first one inside the range)."""
        if not self.running and self.first <= step <= self.last:
            if self.config.memory:
                torch.cuda.memory._record_memory_history()
            self.profiler.start()
            self.running = True

    def after(self, step: int) -> Path | None:
        """Write the files after the last step; returns the trace."""
        if not self.running or step < self.last:
            return None
        self.profiler.stop()
        self.running = False
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"trace_{self.first}-{self.last}.json"
        self.profiler.export_chrome_trace(str(trace))
        if self.config.memory:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_{self.first}-{self.last}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        return trace
