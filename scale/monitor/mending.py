"""Taking up a run folder whose files may have been damaged, removed or exchanged since: the newest checkpoint's record
(`Saved.record`) says what they were. What can be derived again is, and every loss is said."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scale.checkpoint.manifest import DamagedCheckpoint
from scale.checkpoint.saved import newest_record, saved_in
from scale.config import PretrainRun, parse_config, stored_config
from scale.errors import ScaleError, UsageError
from scale.monitor.kept import BrokenRows, first_lines
from scale.monitor.records import Metrics
from scale.monitor.run_folder import RunFolder
from scale.monitor.run_state import RunState


def hash_of_config(text: str) -> str:
    """`RunState.config_hash`."""
    return hashlib.sha256(text.encode()).hexdigest()


def aside(path: Path) -> Path:
    """Move a file out of the way; a file that was moved there before is replaced. Raises ScaleError."""
    place = path.with_name(f"{path.name}.damaged")
    try:
        os.replace(path, place)  # noqa: PTH105
    except OSError as error:
        raise ScaleError(f"{path}: cannot be moved to {place.name}: {error.strerror}") from None
    return place


def take_up(folder: RunFolder, record: Mapping[str, Any]) -> tuple[RunState, list[str]]:
    """The run state of an earlier start, or a new one; with what had to be mended. Raises ScaleError."""
    fresh = RunState(run_name=folder.path.name, config_hash="")
    if "run_id" in record:
        fresh.run_id, fresh.started_at = record["run_id"], record["started_at"]
    path = folder.run_state
    if not path.exists():
        lost = [f"{path}: is missing: written anew, earlier events are lost"] if record else []
        return fresh, lost
    try:
        state = RunState.load(path)
        if record and state.run_id != fresh.run_id:
            raise ScaleError(f"{path}: is the one of another run ({state.run_name}, {state.run_id})")
    except ScaleError as error:
        place = aside(path)
        return fresh, [f"{error}: written anew, earlier events are lost (the old file is now {place.name})"]
    if state.run_name != fresh.run_name:
        renamed = f"{folder.path}: this run was called {state.run_name} before"
        state.run_name = fresh.run_name
        return state, [renamed]
    return state, []


def config_damage(folder: RunFolder, state: RunState, record: Mapping[str, Any]) -> str | None:
    """What happened to config.yaml since this run wrote it; None if nothing did, or if nobody knows."""
    if "config" not in record:
        return None
    try:
        found = folder.config.read_bytes()
    except OSError:
        return f"{folder.config}: is missing: written anew"
    if found == record["config"].encode() or hashlib.sha256(found).hexdigest() == state.config_hash:
        return None
    return f"{folder.config}: was not the one of this run: written anew"


def config_of(folder: RunFolder) -> PretrainRun:
    """The config that a run was last trained with: the newest checkpoint's record of it, or config.yaml where checkpoints keep
    none. Raises UsageError."""
    found = newest_record(folder.checkpoints)
    if found is None or "config" not in found[1]:
        return stored_config(folder.config)
    return parse_config(found[1]["config"], found[0].path)


def cut_rows(metrics: Metrics, folder: RunFolder, step: int, kept: Mapping[str, Any] | None) -> str | None:
    """Cut metrics.jsonl back to `step`. Returns what is lost, if none of the rows is there any more.

    Raises UsageError where only some are: says how to go on without them, and from where they can be written again.
    """
    try:
        metrics.cut(step, kept)
    except BrokenRows as error:
        ways = [f"put the file back, or go on without its rows: mv {metrics.path} {metrics.path}.damaged"]
        earlier = _checkpoint_that_fits(folder, metrics.path, step)
        if earlier is not None:
            later = " ".join(str(s.path) for s in saved_in(folder.checkpoints) if s.step > earlier)
            ways.append(f"or train again from step {earlier}: rm -r {later}")
        raise UsageError(f"{error} ({'; '.join(ways)})") from None
    if step > 0 and metrics.kept.rows == 0 and (kept is None or kept["rows"]):
        return f"{metrics.path}: the rows up to step {step} are lost; it begins anew after that step"
    return None


def _checkpoint_that_fits(folder: RunFolder, rows: Path, before: int) -> int | None:
    """The step of the newest earlier checkpoint whose rows are all there."""
    for saved in reversed(saved_in(folder.checkpoints)):
        if saved.step < before:
            try:
                kept = saved.record().get("metrics")
                if kept is not None and first_lines(rows, saved.step, kept):
                    return saved.step
            except (DamagedCheckpoint, BrokenRows):
                continue
    return None
