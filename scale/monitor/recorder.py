"""Everything that is written down about a run while it runs, behind one object: metrics, run state, monitors."""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scale.errors import ScaleError, UsageError, one_line
from scale.monitor.mending import aside, config_damage, cut_rows, hash_of_config, take_up
from scale.monitor.progress import WITHOUT_MFU
from scale.monitor.records import Metrics, read_rows
from scale.monitor.run_folder import RunFolder
from scale.monitor.run_state import RunState, Status, read_git
from scale.monitor.trackers import Guarded
from scale.protocols import Monitor, Score, StepReport
from scale.sealed import seal_hash

SAVE_STATE_EVERY = 2.0
"""Seconds between writes of run_state.json while steps go by."""
_STATUS: dict[str | None, Status] = {"completed": "completed", "early stop": "completed", "stopped": "paused"}


class RunRecorder:
    """Implements the loop's `Recorder` and is the stateful monitor of a checkpoint. `flops_per_token` and `peak_flops`
    (FLOP/s) give the model FLOPs utilisation; without them it is null. `flops_per_token` takes the row length."""

    def __init__(
        self,
        folder: RunFolder,
        monitors: Sequence[Monitor],
        facts: dict[str, Any],
        flops_per_token: Callable[[int | None], float] | None = None,
        peak_flops: float | None = None,
    ):
        self.folder, self.facts = folder, facts
        self.monitors = [Guarded(monitor) for monitor in monitors]
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.metrics = Metrics(folder.metrics)
        self.state = RunState(run_name=folder.path.name, config_hash="")
        self._config_text = ""
        self._saved_at = 0.0
        self._said_mfu = False
        self._opened = False
        self._started: list[Guarded] = []
        self._status_before: Status | None = None

    def open(self, config_text: str | None, record: Mapping[str, Any] | None = None) -> None:
        """Begin, or take up the run state of an earlier start; `record` is the one of the newest checkpoint. Damage is mended
        and said. The folder must be locked."""
        self.state, mended = take_up(self.folder, record or {})
        if config_text is not None and (damage := config_damage(self.folder, self.state, record or {})):
            mended.append(damage)
        self._status_before = None if self.state.status == "initializing" else self.state.status
        self._config_text = config_text or ""
        self.state.config_hash = hash_of_config(self._config_text)
        self.state.status, self.state.facts = "initializing", self.facts
        self.state.error_message = self.state.ended_at = None
        for name, value in read_git(Path.cwd()).items():
            setattr(self.state, name, value)
        self._opened = True
        for text in mended:
            self.event("mended", text)
        self.state.save(self.folder.run_state)

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run folder, to find damage by; the rows so far are forced to disk."""
        self.metrics.settle()
        known: dict[str, Any] = {
            "run_id": self.state.run_id,
            "started_at": self.state.started_at,
            "metrics": self.metrics.kept.to_json(),
            "model": seal_hash(self.folder.model),
        }
        return known | ({"config": self._config_text} if self._config_text else {})

    def fresh(self) -> None:
        """No checkpoint to go on from: rows of an attempt that never reached one are dropped."""
        if self.state.checkpoints and self.folder.metrics.exists():
            place = aside(self.folder.metrics)
            self.event(
                "mended", f"no checkpoint is left: training begins anew (the rows so far are now in {place.name})"
            )
        self.metrics.cut(-1)
        self.state.resume(0, [])

    def resumed(self, step: int, checkpoint: Path, record: Mapping[str, Any]) -> None:
        """Training goes on after `step`: later rows belong to the part that is done again. `record`: the checkpoint's.

        Raises UsageError if some of the rows up to `step` are not what was written.
        """
        lost = cut_rows(self.metrics, self.folder, step, record.get("metrics"))
        rows = read_rows(self.folder.metrics) if self.folder.metrics.exists() else []
        self.state.resume(step, rows)
        if lost is not None:
            self.event("mended", lost)
        self.event("resume", f"resumed from {checkpoint}")

    def start(self, steps: int, done: int) -> None:
        """Show the derived numbers and start the monitors. Raises UsageError if one cannot start."""
        self.state.status = "running"
        for monitor in self.monitors:
            self._started.append(monitor)
            monitor.start({**self.facts, "run_id": self._tracked_as(), "steps": steps, "step": done})

    def score_before_training(self, score: Score) -> None:
        self._write(self.metrics.score_row(0, score, self._extra(None)))

    def step(self, report: StepReport, score: Score | None) -> None:
        if report.skipped is not None:
            self.event("skipped_step", f"step {report.step} skipped: {report.skipped}")
        self._write(self.metrics.row(report, score, self._extra(report)))

    def event(self, kind: str, text: str) -> None:
        """Something a reader of the run should know; shown and kept in run_state.json."""
        self.state.note(kind, text)
        print(text, flush=True)

    def close(self, outcome: str | None, error: BaseException | None) -> None:
        """Write the last state: completed, paused (to be continued), cancelled or failed. Then let the monitors finish:
        one that hangs no longer has a say."""
        if not self._opened:  # another process has the folder, or it cannot be written
            return
        status = _STATUS.get(outcome, "cancelled" if isinstance(error, KeyboardInterrupt) else "failed")
        if isinstance(error, UsageError) and self._status_before is not None:
            status = self._status_before  # refused before anything was done: the run is what it was
        self.state.end(status, one_line(error) if error is not None else None)
        try:
            self._save()
        except ScaleError:
            if error is None:  # otherwise the first error is the one to show
                raise
        finally:
            for monitor in self._started:
                monitor.finish(status)

    def state_dict(self) -> dict[str, Any]:
        return self.metrics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metrics.load_state_dict(state)

    def _tracked_as(self) -> str:
        """What trackers know the run by. A copy of the folder under another name is another run to them."""
        return hashlib.sha256(f"{self.state.run_id} {self.state.run_name}".encode()).hexdigest()[:32]

    def _write(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        self.state.observe(row)
        for monitor in self.monitors:
            monitor.log(row)
        if time.monotonic() - self._saved_at > SAVE_STATE_EVERY:
            self._save()

    def _save(self) -> None:
        found = sorted(path.name for path in self.folder.checkpoints.glob("step_*"))
        self.state.checkpoints, self.state.latest_checkpoint = found, found[-1] if found else None
        self.state.save(self.folder.run_state)
        self._saved_at = time.monotonic()

    def _extra(self, report: StepReport | None) -> Mapping[str, Any]:
        extra: dict[str, Any] = {"memory_bytes": memory_bytes()}
        if report is not None and self.flops_per_token and self.peak_flops and report.seconds > 0:
            flops = self.flops_per_token(report.seq_len) * report.tokens
            extra["mfu"] = self._possible(flops / report.seconds / self.peak_flops)
        return extra

    def _possible(self, mfu: float) -> float | None:
        """None above 1, which is said once: the peak was measured too low."""
        if mfu > 1 and not self._said_mfu:
            self._said_mfu = True
            self.event("mfu", WITHOUT_MFU.format(mfu))
        return mfu if mfu <= 1 else None


class Bystander:
    """What the other ranks have in place of a recorder: rank 0 alone writes."""

    def __init__(self, facts: dict[str, Any]):
        self.facts = facts

    def open(self, config_text: str | None, record: Mapping[str, Any] | None = None) -> None:
        raise AssertionError("only rank 0 opens a run folder")

    def record(self) -> dict[str, Any]:
        return {}

    def fresh(self) -> None:
        """Nothing to do."""

    def resumed(self, step: int, checkpoint: Path, record: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def start(self, steps: int, done: int) -> None:
        """Nothing to do."""

    def score_before_training(self, score: Score) -> None:
        """Nothing to do."""

    def step(self, report: StepReport, score: Score | None) -> None:
        """Nothing to do."""

    def event(self, kind: str, text: str) -> None:
        """Nothing to do."""

    def close(self, outcome: str | None, error: BaseException | None) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


def memory_bytes() -> int:
    """Peak so far: of torch's allocator on a GPU, of the resident process on a CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
