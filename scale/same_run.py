"""Whether a started run is asked to go on with the config that it was started with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from scale.checkpoint.manifest import DamagedCheckpoint
from scale.checkpoint.saved import Saved, newest_record, saved_in
from scale.config import PretrainRun, differences, flatten, parse_config, stored_config, to_yaml
from scale.errors import ScaleError, UsageError
from scale.monitor.mending import hash_of_config
from scale.monitor.run_folder import RunFolder
from scale.monitor.run_state import RunState

# What may change between two starts of one run without making it another run.
MAY_CHANGE = (
    "monitor", "checkpoint", "profile", "data.workers", "data.cache", "runs_dir",
    "compute.threads", "compute.timeout", "compute.strategy", "compute.fsdp", "compute.deepspeed",
)  # fmt: skip


def check_same_run(config: PretrainRun, allow: Sequence[str]) -> None:
    """A run folder belongs to one config: that of its newest checkpoint, or of its config.yaml where there is none.

    Raises UsageError naming every key that changed and is not allowed to.
    """
    folder = RunFolder(Path(config.runs_dir) / config.name)
    if not folder.config.exists() and not folder.checkpoints.exists():
        return
    found = newest_record(folder.checkpoints)
    if found is None or "config" not in found[1]:
        before = _unrecorded(folder, config)
    else:
        before = parse_config(found[1]["config"], found[0].path)
    for key in allow:
        if not any(_within(known, key) for known in {**flatten(config), **(flatten(before) if before else {})}):
            raise UsageError(f"--allow-change {key}: the config has no such key")
    if found is not None and before is not None and "config" in found[1]:
        _refuse_foreign_checkpoints(folder, found, before, config, allow)
    if before is not None and (changed := _changed(before, config, allow)):
        raise UsageError(
            f"{folder.config}: this run was started with another config ({_shown(changed)}). "
            f"Use another name, --new, or --allow-change {','.join(changed)}"
        )


def _refuse_foreign_checkpoints(
    folder: RunFolder,
    newest: tuple[Saved, dict[str, Any]],
    before: PretrainRun,
    config: PretrainRun,
    allow: Sequence[str],
) -> None:
    """Checkpoints of another config than config.yaml, which says the same as `config`. Where all are, and they are of this run
    by its id, none is foreign: an allowed change did not reach a checkpoint."""
    changed = _changed(before, config, allow)
    if not changed or not _says_the_same(folder.config, config, allow):
        return
    others = list(_of_another_config(folder, config, allow))
    advice = f"use --allow-change {','.join(changed)}"
    if len(others) < len(saved_in(folder.checkpoints)) or newest[1].get("run_id") != _run_id(folder):
        advice = f"remove what does not belong to this run (rm -r {' '.join(others)}), or {advice}"
    raise UsageError(
        f"{newest[0].path}: was written with another config than {folder.config} says ({_shown(changed)}): {advice}"
    )


def _unrecorded(folder: RunFolder, config: PretrainRun) -> PretrainRun | None:
    """config.yaml, where no checkpoint says what it was. None: there is nothing to go on from, or it is known to be the
    same."""
    try:
        return stored_config(folder.config)
    except UsageError as error:
        if not saved_in(folder.checkpoints) or _hash_before(folder) == hash_of_config(to_yaml(config)):
            return None
        raise UsageError(
            f"{folder.config}: cannot be read, and neither run_state.json nor the checkpoints (of an older version) tell "
            f"whether this config is the same: put the file back, use another name, or --new ({_first_line(error)})"
        ) from None


def _run_id(folder: RunFolder) -> str | None:
    try:
        return RunState.load(folder.run_state).run_id
    except ScaleError:
        return None


def _hash_before(folder: RunFolder) -> str | None:
    try:
        return RunState.load(folder.run_state).config_hash
    except ScaleError:
        return None


def _of_another_config(folder: RunFolder, config: PretrainRun, allow: Sequence[str]) -> Iterator[str]:
    """Paths of the checkpoints whose record says another config."""
    for saved in saved_in(folder.checkpoints):
        with suppress(DamagedCheckpoint):
            record = saved.record()
            if "config" in record and _changed(parse_config(record["config"], saved.path), config, allow):
                yield str(saved.path)


def _says_the_same(path: Path, config: PretrainRun, allow: Sequence[str]) -> bool:
    try:
        return not _changed(stored_config(path), config, allow)
    except UsageError:
        return False


def _changed(before: PretrainRun, config: PretrainRun, allow: Sequence[str]) -> dict[str, tuple[object, object]]:
    return {
        key: values
        for key, values in differences(before, config).items()
        if not any(_within(key, allowed) for allowed in (*MAY_CHANGE, *allow))
    }


def _shown(changed: dict[str, tuple[object, object]]) -> str:
    return "; ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")
