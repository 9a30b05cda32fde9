"""run_state.json: what a run is, where it stands and what happened to it, in one small file for people and programs."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from scale.errors import ScaleError
from scale.files import write_atomic
from scale.monitor.records import finite

TRANSITIONS = 1000
"""Phase changes kept: the file is written every few seconds, and phases may alternate every step."""
EVENTS = 200
"""Events kept of each kind: a kind that comes every step must not drive out the others."""
Status = Literal["initializing", "running", "paused", "completed", "failed", "cancelled"]
"""paused: stopped on request with a checkpoint, to be continued by the same command."""


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Transition:
    """The first step of a new phase."""

    step: int
    phase: str
    at: str


@dataclass
class Event:
    """Something that a reader of the run should know. `kind`: resume, out_of_memory, checkpoint, skipped_step, stop..."""

    step: int
    kind: str
    text: str
    at: str


@dataclass
class RunState:
    """All fields of run_state.json. Units: bytes, degrees Celsius, watts, percent; None where there is no GPU or git.

    `phase_transitions` holds the last `TRANSITIONS` ones, `events` the last `EVENTS` of each kind; `events_left_out` counts
    the earlier ones, by kind.
    """

    run_name: str
    config_hash: str
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    version: Literal[1] = 1
    status: Status = "initializing"
    started_at: str = field(default_factory=now)
    updated_at: str = field(default_factory=now)
    ended_at: str | None = None
    step: int = 0
    loss: float | None = None
    phase: str | None = None
    total_forward: int = 0
    total_backward: int = 0
    best_val_loss: float | None = None
    best_val_step: int | None = None
    error_message: str | None = None
    latest_checkpoint: str | None = None
    checkpoints: list[str] = field(default_factory=list)
    phase_transitions: list[Transition] = field(default_factory=list)
    gpu_memory_used: int | None = None
    gpu_memory_total: int | None = None
    gpu_temperature: int | None = None
    gpu_power: float | None = None
    gpu_utilisation: int | None = None
    steps_per_second: float | None = None
    tokens_per_second: float | None = None
    git_commit: str | None = None
    git_branch: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    events_left_out: dict[str, int] = field(default_factory=dict)

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    def observe(self, row: Mapping[str, Any]) -> None:
        """Take over what a metrics row says: place, loss, totals, speed, best held-out loss, change of phase."""
        self.step, self.loss = row["step"], row["loss"]
        self.total_forward, self.total_backward = row["forward_passes"], row["backward_passes"]
        self.tokens_per_second = row["tokens_per_second"]
        self.steps_per_second = 1000 / row["step_time_ms"] if row["step_time_ms"] else None
        if row["phase"] is not None and row["phase"] != self.phase:
            self.phase = row["phase"]
            self.phase_transitions.append(Transition(self.step, row["phase"], _when(row["timestamp"])))
            del self.phase_transitions[:-TRANSITIONS]
        val_loss = finite(row["val_loss"])
        if val_loss is not None and (self.best_val_loss is None or val_loss < self.best_val_loss):
            self.best_val_loss, self.best_val_step = val_loss, self.step

    def note(self, kind: str, text: str) -> None:
        """Add an event at the present step."""
        self.events.append(Event(self.step, kind, text, now()))
        same = [event for event in self.events if event.kind == kind]
        if len(same) > EVENTS:
            self.events.remove(same[0])
            self.events_left_out[kind] = self.events_left_out.get(kind, 0) + 1

    def end(self, status: Status, error_message: str | None = None) -> None:
        """The run has stopped, for good or to be continued."""
        self.status, self.error_message, self.ended_at = status, error_message, now()

    def resume(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Go back to the checkpoint of `step`: what came after it has not happened. `rows`: metrics cut to that step."""
        kept = [transition for transition in self.phase_transitions if transition.step <= step]
        self.phase_transitions = []
        self.best_val_loss = self.best_val_step = self.phase = None
        for row in rows:
            self.observe(row)
        self.step, self.phase_transitions = step, kept or self.phase_transitions
        self.status, self.error_message, self.ended_at = "running", None, None

    def save(self, path: Path) -> None:
        """Write atomically, with the present time and GPU readings. Raises ScaleError."""
        self.updated_at = now()
        for name, value in read_gpu().items():
            setattr(self, name, value)
        write_atomic(path, json.dumps(finite(asdict(self)), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> RunState:
        """Read back. Raises ScaleError naming the field for anything missing, unknown or of another type."""
        try:
            raw = path.read_bytes()
            missing = set(cls.__dataclass_fields__) - set(json.loads(raw)) - _NEW
            if missing:
                raise ScaleError(f"{path}: field {min(missing)} is missing")
            return _ADAPTER.validate_json(raw)
        except OSError as error:
            raise ScaleError(f"{path}: cannot be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ScaleError(f"{path}: {place}: {first['msg']}") from None
        except (ValueError, TypeError):
            raise ScaleError(f"{path}: is not a run state") from None


_ADAPTER = TypeAdapter(RunState)
_NEW = {"events_left_out"}
"""Fields that a run state of an older version lacks."""


def _when(timestamp: float) -> str:
    """Seconds since 1970 as `now` writes them."""
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="seconds")


def read_gpu() -> dict[str, int | float | None]:
    """Readings of the current CUDA device; all None without one, and each None that the driver does not tell."""
    if not torch.cuda.is_available():
        return dict.fromkeys(("gpu_memory_used", "gpu_memory_total", "gpu_temperature", "gpu_power", "gpu_utilisation"))
    free, total = torch.cuda.mem_get_info()
    return {
        "gpu_memory_used": total - free,
        "gpu_memory_total": total,
        "gpu_temperature": _reading(torch.cuda.temperature),
        "gpu_power": None if (milliwatts := _reading(torch.cuda.power_draw)) is None else milliwatts / 1000,
        "gpu_utilisation": _reading(torch.cuda.utilization),
    }


def _reading(read: Any) -> int | None:
    try:
        return int(read())
    except Exception:  # NVML missing, or a device that does not support this reading: each driver has errors of its own
        return None


def read_git(folder: Path) -> dict[str, str | None]:
    """Commit and branch of the checkout around `folder`; None outside git, without commits, on no branch."""
    commit = _git(folder, "rev-parse", "HEAD")
    return {"git_commit": commit, "git_branch": _git(folder, "symbolic-ref", "--short", "HEAD") if commit else None}


def _git(folder: Path, *arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, encoding="utf-8", errors="replace")
    return done.stdout.strip() if done.returncode == 0 else None
