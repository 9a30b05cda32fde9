"""One checkpoint on disk, and finding the newest good one. Nothing here writes."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Size, Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta

from scale.checkpoint.manifest import DamagedCheckpoint, Manifest, TensorEntry, check_file, read_manifest, verify
from scale.errors import Elsewhere, ScaleError
from scale.files import from_json
from scale.parallel.ranks import Ranks

STATE = "state.json"
RECORD = "run.json"
"""What the run folder held when the checkpoint was taken: by it damage of the other files is found."""
_NAME = re.compile(r"step_(\d{8,})")


@dataclass
class Saved:
    """A checkpoint folder. Its content is checked in full before any of it is used."""

    path: Path
    step: int
    val_loss: float | None
    _verified: Manifest | None = field(default=None, repr=False, compare=False)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Hash every file (or this part of them), now. Raises DamagedCheckpoint, which names file and damage."""
        self._verified = None
        manifest = verify(self.path, part, parts)
        if manifest.step != self.step:
            raise DamagedCheckpoint(f"{self.path}: holds step {manifest.step}, not the one its name says")
        self._verified = manifest

    def state(self) -> dict[str, Any]:
        """The JSON state that was given to `save`. Raises DamagedCheckpoint."""
        self._manifest()
        loaded: dict[str, Any] = from_json((self.path / STATE).read_text(encoding="utf-8"))
        return loaded

    def record(self) -> dict[str, Any]:
        """What the run folder held at that time; empty where none was kept (older versions). Only this file is hashed.
        Raises DamagedCheckpoint."""
        manifest = read_manifest(self.path)
        if manifest.step != self.step:
            raise DamagedCheckpoint(f"{self.path}: holds step {manifest.step}, not the one its name says")
        if RECORD not in manifest.files:
            return {}
        check_file(self.path / RECORD, manifest.files[RECORD])
        loaded: dict[str, Any] = from_json((self.path / RECORD).read_text(encoding="utf-8"))
        return loaded

    def shapes(self) -> dict[str, Size]:
        """Names and global shapes of all tensors. Raises DamagedCheckpoint."""
        return {name: Size(entry.shape) for name, entry in self._manifest().tensors.items()}

    def read(self, tensors: dict[str, Tensor]) -> None:
        """Read the tensors of these names, in place. Raises DamagedCheckpoint, or ScaleError if they do not fit."""
        saved = self._manifest().tensors
        for name, tensor in tensors.items():
            if name not in saved:
                raise ScaleError(f"{self.path}: holds no tensor {name!r}")
            wanted = (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            there = (saved[name].shape, saved[name].dtype)
            if wanted != there:
                raise ScaleError(f"{self.path}: {name}: shape and dtype {there} on disk, {wanted} wanted")
        quiet_single_process()
        reader = _Reader(self.path)
        try:
            reader.read_metadata()  # why a forged one is refused, DCP of torch 2.11 does not pass on
            # a fresh dict: DCP replaces its values, we want in-place copies only
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
        except (CheckpointException, pickle.UnpicklingError, OSError) as error:
            raise ScaleError(f"{self.path}: cannot be read: {reason(error)}") from None

    def _manifest(self) -> Manifest:
        if self._verified is None:
            self.verify()
        assert self._verified is not None
        return self._verified


def saved_in(folder: Path) -> list[Saved]:
    """All checkpoints of a folder by step, unverified (`val_loss` of one whose manifest is damaged is None)."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        if match := _NAME.fullmatch(path.name):
            found.append(Saved(path, int(match[1]), _val_loss(path)))
    return sorted(found, key=lambda saved: saved.step)


def newest_record(folder: Path) -> tuple[Saved, dict[str, Any]] | None:
    """The newest checkpoint whose record is whole and not empty, with the record; its tensors are not looked at."""
    for saved in reversed(saved_in(folder)):
        with suppress(DamagedCheckpoint):
            if record := saved.record():
                return saved, record
    return None


def latest_good(folder: Path, say: Callable[[str], None], ranks: Ranks | None = None) -> Saved | None:
    """The newest checkpoint that verifies, or None if there are none at all; several ranks share the hashing.

    Says file and reason of every damaged one on the way. Raises ScaleError if there are checkpoints but none is good.
    """
    ranks = ranks or Ranks()
    names = ranks.lead(lambda: [[saved.path.name, saved.step, saved.val_loss] for saved in saved_in(folder)])
    found = [Saved(folder / name, step, val_loss) for name, step, val_loss in names]
    for saved in reversed(found):
        try:
            ranks.each(partial(saved.verify, ranks.rank, ranks.world_size))
            return saved
        except (DamagedCheckpoint, Elsewhere) as error:
            say(f"damaged checkpoint passed over: {error}")
    if found:
        raise ScaleError(f"{folder}: none of the {len(found)} checkpoints is whole (remove the folder to start afresh)")
    return None


def reason(error: BaseException) -> str:
    """What went wrong, in one line; the first rank's error where DCP bundles them."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, ScaleError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:  # torch.save hides "no space left" behind an internal error of its own
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def quiet_single_process() -> None:
    """DCP warns on every call without a process group; the filter list keeps one entry however often this is called."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _val_loss(path: Path) -> float | None:
    try:
        return read_manifest(path).val_loss
    except DamagedCheckpoint:
        return None


def tensors_in(folder: Path) -> dict[str, TensorEntry]:
    """Names, global shapes and dtypes of the tensors that DCP has written into a folder."""
    found: dict[str, Any] = _Reader(folder).read_metadata().state_dict_metadata
    return {
        name: TensorEntry(list(entry.size), str(entry.properties.dtype).removeprefix("torch."))
        for name, entry in sorted(found.items())
    }


class _Reader(dcp.FileSystemReader):
    """DCP's own reader, except that its `.metadata`, a pickle, can name nothing but DCP's plain records.

    Checkpoints travel between people, and hashes do not stop forgery.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as handle:
            metadata: Metadata = _RecordUnpickler(handle).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_RECORDS: Mapping[str, set[str]] = {
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


class _RecordUnpickler(pickle.Unpickler):
    def __init__(self, handle: IO[bytes]):
        super().__init__(handle)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _memory_format(owner: Any, name: Any) -> _MEM_FORMAT_ENCODING:
    """Stands in for `getattr`, by which some Pythons (3.11.2 is one) pickle the members of an enum."""
    if owner is not _MEM_FORMAT_ENCODING or not isinstance(name, str) or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f".metadata asks for attribute {name!r} of {owner!r}, which no checkpoint needs")
    return _MEM_FORMAT_ENCODING[name]
