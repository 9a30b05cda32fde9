"""What each rank runs: `scale train` with the user's config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from scale.cluster.options import check_gpus
from scale.config import load_config
from scale.config.rows import check_rows
from scale.errors import UsageError
from scale.monitor.run_folder import new_name


def train_command(
    config: Path,
    overrides: Sequence[str],
    allow_change: str = "",
    new: bool = False,
    several: bool = False,
    ranks: int = 1,
    gpus: tuple[int, str] | None = None,
) -> tuple[list[str], Path]:
    """Arguments for the Python interpreter of a rank, and the run folder.

    new: the ranks share one new name; several: with other supervisors, which would each choose another one; gpus: how
    many this machine must have, and the words that ask for them.
    Raises UsageError if the config is wrong, does not fit so many `ranks`, or its runs_dir cannot be written.
    """
    if new and several:
        raise UsageError("--new with several nodes: each would choose another name; give the same name=NAME to all")
    settings = load_config(config, list(overrides))
    check_rows(settings, ranks)
    if gpus is not None:
        check_gpus(*gpus, settings.compute.device)
    _check_writable(Path(settings.runs_dir))
    name = new_name(settings.name) if new else settings.name
    command = ["-m", "scale.cli.main", "train", str(config), *overrides]
    if new:
        command.append(f"name={name}")
    if allow_change:
        command += ["--allow-change", allow_change]
    return command, Path(settings.runs_dir) / name


def _check_writable(runs_dir: Path) -> None:
    """Raise UsageError if the folder cannot be made or written: ranks would find out a minute later."""
    place = next(folder for folder in (runs_dir.absolute(), *runs_dir.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "is not a folder" if not place.is_dir() else "is not writable"
        raise UsageError(f"runs_dir = {str(runs_dir)!r}: {place} {why} (choose another runs_dir)")
