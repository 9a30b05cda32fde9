"""What each rank runs: `scale train` with the user's config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scale.config import load_config
from scale.errors import UsageError
from scale.monitor.run_folder import new_name


def train_command(
    config: Path, overrides: Sequence[str], allow_change: str = "", new: bool = False, several: bool = False
) -> tuple[list[str], Path]:
    """Arguments for the Python interpreter of a rank, and the run folder.

    new: the ranks share one new name; several: with other supervisors, which would each choose another one.
    Raises UsageError if the config is wrong.
    """
    if new and several:
        raise UsageError("--new with several nodes: each would choose another name; give the same name=NAME to all")
    settings = load_config(config, list(overrides))
    name = new_name(settings.name) if new else settings.name
    command = ["-m", "scale.cli.main", "train", str(config), *overrides]
    if new:
        command.append(f"name={name}")
    if allow_change:
        command += ["--allow-change", allow_change]
    return command, Path(settings.runs_dir) / name
