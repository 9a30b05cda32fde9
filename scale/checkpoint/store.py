"""Writing checkpoints in the background, and keeping few of them.

The order of the steps is what makes a kill at any instant harmless: everything goes into a hidden `.tmp-` folder; the
manifest is its last file; one rename makes it a `step_` folder. Removal goes the other way: rename to hidden, then delete.
With several ranks, each would write its files into the same hidden folder (DCP does) and rank 0 alone would go on to the
manifest, after a barrier.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, contiguous_format

from scale.checkpoint.manifest import DamagedCheckpoint, Manifest
from scale.checkpoint.saved import STATE, Saved, latest_good, quiet_single_process, reason, saved_in
from scale.errors import ScaleError
from scale.files import fsync

__all__ = ["Checkpoints", "DamagedCheckpoint", "Saved"]

_TEMPORARY = ".tmp-"
_REPLACED = ".old-"


class Checkpoints:
    """The checkpoints of one run, owned by the process that trains it. To look at them from outside: `saved_in`."""

    def __init__(self, folder: Path, keep_last: int, keep_best: int, say: Callable[[str], None] = print):
        """Make the folder and remove what a killed process left half-written. Raises ScaleError if that fails."""
        self.folder, self.keep_last, self.keep_best, self.say = folder, keep_last, keep_best, say
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._damaged: set[Path] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._clean_up()
        except OSError as error:
            raise ScaleError(f"{folder}: no checkpoints can be written here: {error.strerror}") from None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], val_loss: float | None) -> None:
        """Take a snapshot now and write it in the background; a second save waits for the first.

        `tensors` and `state` may change as soon as this returns. A `val_loss` that is not finite counts as None.
        Raises ScaleError if the save before failed.
        """
        self.wait()
        text = json.dumps(state)
        copies = {k: t.detach().to("cpu", copy=True, memory_format=contiguous_format) for k, t in tensors.items()}
        score = val_loss if val_loss is not None and math.isfinite(val_loss) else None
        self._thread = threading.Thread(target=self._run, args=(step, copies, text, score), name=f"checkpoint {step}")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written. Raises ScaleError if writing failed (once)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def poll(self) -> None:
        """Raise ScaleError if writing failed (once); never waits."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise ScaleError(failure)

    def saved(self) -> list[Saved]:
        """All checkpoints by step, unverified."""
        return saved_in(self.folder)

    def latest_good(self) -> Saved | None:
        """The newest checkpoint that verifies; None if there are none. Names damaged ones, which then count no more.

        Raises ScaleError if there are checkpoints but none is good.
        """
        found = latest_good(self.folder, self.say)
        if found is not None:
            self._damaged = {saved.path for saved in self.saved() if saved.step > found.step}
        return found

    def _run(self, step: int, tensors: dict[str, Tensor], state: str, val_loss: float | None) -> None:
        try:
            self._write(step, tensors, state, val_loss)
        except BaseException as error:  # DCP's CheckpointException is no Exception
            what = f"{self.folder}: the checkpoint of step {step} could not be written: {reason(error)}"
            self._failure = f"{what} (mend it, then run again)"
            return
        try:
            self._rotate(self._path(step))
        except OSError as error:
            self._failure = f"{self.folder}: old checkpoints could not be removed: {error.strerror}"

    def _write(self, step: int, tensors: dict[str, Tensor], state: str, val_loss: float | None) -> None:
        final = self._path(step)
        aside = self._aside(_TEMPORARY, final)
        try:
            aside.mkdir()
            quiet_single_process()
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(aside), no_dist=True)
            (aside / STATE).write_text(state, encoding="utf-8")
            Manifest.describe(aside, step, val_loss, tensors).write(aside)
            for path in (*aside.iterdir(), aside):
                fsync(path)
            self._publish(aside, final)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _publish(self, aside: Path, final: Path) -> None:
        """Put the finished folder in place; one that is there already steps aside and comes back if we die between."""
        replaced = self._aside(_REPLACED, final)
        if final.exists():
            os.replace(final, replaced)  # noqa: PTH105
        os.replace(aside, final)  # noqa: PTH105
        fsync(self.folder)
        self._damaged.discard(final)
        shutil.rmtree(replaced, ignore_errors=True)

    def _rotate(self, newest: Path) -> None:
        """Keep the last, the best by held-out loss and the one just written; remove the rest."""
        found = self.saved()
        good = [saved for saved in found if saved.path not in self._damaged]
        scored = sorted((s for s in good if s.val_loss is not None), key=lambda s: (s.val_loss, -s.step))
        keep = {newest} | {s.path for s in good[-self.keep_last :]} | {s.path for s in scored[: self.keep_best]}
        for saved in found:
            if saved.path not in keep:
                hidden = self._aside(_TEMPORARY, saved.path)
                os.replace(saved.path, hidden)  # noqa: PTH105
                shutil.rmtree(hidden)

    def _clean_up(self) -> None:
        for path in self.folder.iterdir():
            final = self.folder / path.name.removeprefix(_REPLACED)
            if path.name.startswith(_TEMPORARY):
                shutil.rmtree(path)
            elif path.name.startswith(_REPLACED):
                if final.exists():
                    shutil.rmtree(path)
                else:
                    os.replace(path, final)  # noqa: PTH105

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    @staticmethod
    def _aside(prefix: str, final: Path) -> Path:
        return final.with_name(prefix + final.name)
