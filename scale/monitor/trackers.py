"""TensorBoard and Weights & Biases, and the guard that keeps a failing monitor from stopping a run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scale.config.run import WandbConfig
from scale.errors import MissingExtra, UsageError, one_line
from scale.protocols import Monitor

FINISH_SECONDS, LEAVE_SECONDS = 60.0, 3.0
"""How long a monitor may take to finish when a run is completed, and when it ends in another way."""


class Guarded:
    """`monitor`, switched off by its first failure, which is told in one line; only the `start` of a new run may stop it."""

    def __init__(self, monitor: Monitor, say: Callable[[str], None] = print):
        self.monitor, self.say, self.name = monitor, say, monitor.name
        self.off = False

    def start(self, facts: Mapping[str, Any]) -> None:
        """Raises UsageError in one line, whatever the monitor raised. A run that goes on (`facts["step"]` > 0) is not ended
        by a service that happens to be down: only a UsageError stops it."""
        try:
            self.monitor.start(facts)
        except UsageError:
            raise
        except Exception as error:
            if facts.get("step"):
                return self._switch_off(error)
            raise UsageError(
                f"monitor.{self.name}: cannot start: {one_line(error)[:300]} (mend it or turn it off)"
            ) from error

    def log(self, row: Mapping[str, Any]) -> None:
        self._run(lambda: self.monitor.log(row))

    def finish(self, status: str) -> None:
        """Give the monitor its time to finish: longer at the end of a run than where a scheduler or a person waits."""
        seconds = FINISH_SECONDS if status == "completed" else LEAVE_SECONDS
        thread = threading.Thread(target=self._run, args=(lambda: self.monitor.finish(status),), daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            self.say(f"monitor.{self.name}: has not finished within {seconds:g} s: left behind")

    def _run(self, call: Callable[[], None]) -> None:
        if self.off:
            return
        try:
            call()
        except Exception as error:
            self._switch_off(error)

    def _switch_off(self, error: Exception) -> None:
        self.off = True
        self.say(f"monitor.{self.name}: off for the rest of the run: {one_line(error)[:300]}")
        with suppress(Exception):  # a last chance to let go of the terminal, files and threads
            self.monitor.finish("failed")


class TensorBoard:
    """Numbers of every row as scalars, by step; facts as text. What an earlier, cut-off run wrote later is purged."""

    name = "tensorboard"

    def __init__(self, folder: Path):
        """Raises MissingExtra."""
        if find_spec("tensorboard") is None:
            raise MissingExtra("monitor.tensorboard", "tensorboard")
        self.folder = folder
        self._facts: Mapping[str, Any] = {}
        self._writer: Any = None

    def start(self, facts: Mapping[str, Any]) -> None:
        self._facts = facts
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.folder}: monitor.tensorboard cannot write here: {error.strerror}") from None

    def log(self, row: Mapping[str, Any]) -> None:
        if self._writer is None:  # only the first row tells where the run goes on
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=row["step"])
            text = "\n".join(f"    {name}: {value}" for name, value in self._facts.items())
            self._writer.add_text("facts", text, row["step"])
        for tag, value in numbers(row):
            self._writer.add_scalar(tag, value, row["step"], walltime=row["timestamp"])

    def finish(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Wandb:
    """Weights & Biases. Offline unless the config says otherwise; the key comes from WANDB_API_KEY and nowhere else.

    Its run has the id of ours (`facts["run_id"]`), so that a resumed run goes on as the same one. Its exit code is 0 also
    where the run was paused: only a failed run is marked as one.
    """

    name = "wandb"

    def __init__(self, config: WandbConfig, run_name: str, folder: Path):
        """Raises MissingExtra, or UsageError for online mode without a key."""
        if find_spec("wandb") is None:
            raise MissingExtra("monitor.wandb", "wandb")
        if config.mode == "online" and not os.environ.get("WANDB_API_KEY"):
            raise UsageError("monitor.wandb.mode: online: needs WANDB_API_KEY in the environment (or use offline)")
        self.config, self.run_name, self.folder = config, run_name, folder
        self._run: Any = None

    def start(self, facts: Mapping[str, Any]) -> None:
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self.config.project,
            name=self.run_name,
            id=facts["run_id"],
            resume="allow",
            mode=self.config.mode,
            dir=str(self.folder),
            config={name: value for name, value in facts.items() if name not in ("run_id", "step")},
            allow_val_change=True,  # a resumed run may be on another machine
        )

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(numbers(row)), step=row["step"])

    def finish(self, status: str) -> None:
        if self._run is not None:
            self._run.summary["status"] = status
            self._run.finish(exit_code=0 if status in ("completed", "paused") else 1)


def numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a row, nested ones as `layer_gradients/NAME`; texts, nulls, flags and the step are left out."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}/")
        elif (
            isinstance(value, int | float) and not isinstance(value, bool) and prefix + key not in ("step", "timestamp")
        ):
            yield prefix + key, value
