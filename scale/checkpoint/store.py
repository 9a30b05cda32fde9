"""Writing checkpoints in the background, and keeping few of them.

The order of the steps is what makes a kill at any instant harmless: everything goes into a hidden `.tmp-` folder; the
manifest is its last file; one rename makes it a `step_` folder. Removal goes the other way: rename to hidden, then delete.
With several ranks each writes, hashes and forces to disk its own files in the same hidden folder; rank 0 alone goes on to
the manifest when all are done.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed.checkpoint as dcp
from torch import Tensor, contiguous_format
from torch.distributed.checkpoint.api import CheckpointException

from scale.checkpoint.manifest import MANIFEST, DamagedCheckpoint, FileEntry, Manifest, entry_of
from scale.checkpoint.saved import RECORD, STATE, Saved, latest_good, quiet_single_process, reason, saved_in, tensors_in
from scale.errors import Elsewhere, ScaleError
from scale.files import fsync, to_json
from scale.parallel.ranks import Ranks

__all__ = ["Checkpoints", "DamagedCheckpoint", "Saved"]

T = TypeVar("T")

_TEMPORARY = ".tmp-"
_REPLACED = ".old-"


class Checkpoints:
    """The checkpoints of one run, owned by the processes that train it. To look at them from outside: `saved_in`."""

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        keep_best: int,
        say: Callable[[str], None] = print,
        ranks: Ranks | None = None,
    ):
        """Make the folder and remove what a killed process left half-written. Raises ScaleError if that fails. Collective."""
        self.folder, self.keep_last, self.keep_best, self.say = folder, keep_last, keep_best, say
        self.ranks = ranks or Ranks()
        self._thread: threading.Thread | None = None
        self._failure: ScaleError | None = None
        self._damaged: set[Path] = set()
        self.ranks.lead(self._prepare)
        self._behind = self.ranks.beside()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        val_loss: float | None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a snapshot now and write it in the background; a second save waits for the first.

        `tensors` and `state` may change as soon as this returns; the state of rank 0 is the one that is written, and its
        `record`, what the run folder holds (`Saved.record`). A `val_loss` that is not finite counts as None. Raises
        ScaleError if the save before failed.
        """
        self.wait()
        texts = {STATE: to_json(state), RECORD: to_json(dict(record or {}))}
        copies = {name: _copy(tensor) for name, tensor in tensors.items()}
        score = val_loss if val_loss is not None and math.isfinite(val_loss) else None
        # a daemon, so that a rank whose peers died during a save can end
        self._thread = threading.Thread(
            target=self._run, args=(step, copies, texts, score), name=f"checkpoint {step}", daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Return when nothing is being written, or after this time. Raises ScaleError if writing failed (once)."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None
        self.poll()

    def poll(self) -> None:
        """Raise ScaleError if writing failed (once); never waits."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def saved(self) -> list[Saved]:
        """All checkpoints by step, unverified."""
        return saved_in(self.folder)

    def latest_good(self) -> Saved | None:
        """The newest checkpoint that verifies; None if there are none. Names damaged ones, which then count no more.

        Raises ScaleError if there are checkpoints but none is good.
        """
        found = latest_good(self.folder, self.say, self.ranks)
        if found is not None:
            self._damaged = {saved.path for saved in self.saved() if saved.step > found.step}
        return found

    def _run(self, step: int, tensors: dict[str, Tensor], texts: dict[str, str], val_loss: float | None) -> None:
        try:
            self._write(step, tensors, texts, val_loss)
            self._behind.lead(lambda: self._rotate(self._path(step)))
        except Elsewhere as error:
            self._failure = error
        except BaseException as error:  # DCP's CheckpointException is no Exception
            what = f"{self.folder}: the checkpoint of step {step} could not be written: {reason(error)}"
            same = isinstance(error, CheckpointException) and self._behind.rank > 0  # DCP tells every rank
            self._failure = Elsewhere(what) if same else ScaleError(f"{what} (mend it, then run again)")

    def _write(self, step: int, tensors: dict[str, Tensor], texts: dict[str, str], val_loss: float | None) -> None:
        ranks, final = self._behind, self._path(step)
        aside = self._aside(_TEMPORARY, final)
        try:
            ranks.lead(lambda: _in_one_line(aside.mkdir))
            quiet_single_process()
            writer = dcp.FileSystemWriter(aside)
            dcp.save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=ranks.world_size == 1)
            mine = ranks.each(lambda: _in_one_line(partial(_files_of, aside, ranks.rank)))
            files = {name: FileEntry(*entry) for part in ranks.gather(mine) for name, entry in part.items()}
            ranks.lead(lambda: _in_one_line(partial(self._finish, aside, final, step, texts, val_loss, files)))
        except BaseException:
            if ranks.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _finish(
        self,
        aside: Path,
        final: Path,
        step: int,
        texts: dict[str, str],
        val_loss: float | None,
        files: dict[str, FileEntry],
    ) -> None:
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        for name in (*texts, ".metadata"):
            files[name] = entry_of(aside / name)
        Manifest.describe(step, val_loss, tensors_in(aside), files).write(aside)
        for name in (*texts, ".metadata", MANIFEST, "."):
            fsync(aside / name)
        self._publish(aside, final)

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
        try:
            self._remove_all_but(newest)
        except OSError as error:
            raise ScaleError(f"old checkpoints could not be removed: {error.strerror}") from None

    def _remove_all_but(self, newest: Path) -> None:
        found = self.saved()
        good = [saved for saved in found if saved.path not in self._damaged]
        scored = sorted((s for s in good if s.val_loss is not None), key=lambda s: (s.val_loss, -s.step))
        keep = {newest} | {s.path for s in good[-self.keep_last :]} | {s.path for s in scored[: self.keep_best]}
        for saved in found:
            if saved.path not in keep:
                hidden = self._aside(_TEMPORARY, saved.path)
                os.replace(saved.path, hidden)  # noqa: PTH105
                shutil.rmtree(hidden)

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean_up()
        except OSError as error:
            raise ScaleError(f"{self.folder}: no checkpoints can be written here: {error.strerror}") from None

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


def _copy(tensor: Tensor) -> Tensor:
    """A copy in CPU memory; of a DTensor, of this rank's part."""
    return tensor.detach().to("cpu", copy=True, memory_format=contiguous_format)


def _files_of(folder: Path, rank: int) -> dict[str, list[Any]]:
    """Name -> size and hash of the files that DCP wrote for a rank, each forced to disk."""
    found = {}
    for path in folder.glob(f"__{rank}_*"):
        fsync(path)
        entry = entry_of(path)
        found[path.name] = [entry.bytes, entry.sha256]
    return found


def _in_one_line(run: Callable[[], T]) -> T:
    """Errors of the file system as ScaleError, which ranks tell each other."""
    try:
        return run()
    except OSError as error:
        raise ScaleError(error.strerror or str(error)) from None
