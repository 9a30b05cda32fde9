"""The write side of a token store: documents go in one by one, shards and a manifest come out."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from scale.data.documents import FORMAT, Manifest, Shard, Split, StoredFile, write_manifest
from scale.errors import UsageError

SHARD_TOKENS = 100_000_000
Dtype = Literal["auto", "uint16", "uint32"]


def choose_dtype(wanted: Dtype, vocab_size: int | None) -> Literal["uint16", "uint32"]:
    """The narrowest type that holds every id; an explicit one is checked. Unknown vocabularies get uint32."""
    if wanted == "uint16" and vocab_size is not None and vocab_size > 1 << 16:
        raise UsageError(f"dtype uint16: holds ids up to 65535, but the tokenizer has {vocab_size} entries; use uint32")
    if wanted != "auto":
        return wanted
    return "uint16" if vocab_size is not None and vocab_size <= 1 << 16 else "uint32"


class StoreWriter:
    """Writes `train-*` and `valid-*` shards into a folder. Use within `new_folder`; `finish` writes the manifest."""

    def __init__(self, folder: Path, dtype: Literal["uint16", "uint32"], shard_tokens: int = SHARD_TOKENS):
        self.folder, self.dtype = folder, dtype
        self._shard_tokens = shard_tokens
        self._open: dict[Split, _ShardWriter] = {}
        self.shards: dict[Split, list[Shard]] = {"train": [], "valid": []}

    def add(self, split: Split, ids: np.ndarray, learned: np.ndarray | None, where: str) -> None:
        """One document. Raises UsageError if an id does not fit the type."""
        if ids.max() > np.iinfo(self.dtype).max:
            raise UsageError(f"{where}: token id {ids.max()} does not fit {self.dtype}")
        writer = self._open.get(split)
        if writer is None or writer.tokens >= self._shard_tokens:
            self._close(split)
            name = f"{split}-{len(self.shards[split]):05d}"
            writer = self._open[split] = _ShardWriter(self.folder, name, np.dtype(self.dtype))
        writer.add(ids, learned)

    def finish(self, **facts: Any) -> Manifest:
        """Close the shards and write manifest.json with these facts in addition."""
        for split in ("train", "valid"):
            self._close(split)
        every = self.shards["train"] + self.shards["valid"]
        max_id = max((s.max_id for s in every), default=-1)
        manifest = Manifest(
            version=FORMAT,
            dtype=self.dtype,
            max_id=max_id,
            train=self.shards["train"],
            valid=self.shards["valid"],
            **facts,
        )
        write_manifest(manifest, self.folder)
        return manifest

    def close(self) -> None:
        """Let go of unfinished files; nothing to do after `finish`."""
        for writer in self._open.values():
            writer.close()

    def _close(self, split: Split) -> None:
        if split in self._open:
            self.shards[split].append(self._open[split].finish())
            del self._open[split]


class _ShardWriter:
    """Appends to .npy files; not through memory maps, because a full disk would then kill the process."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self._folder, self._name = folder, name
        self._ids = _GrowingArray(folder / f"{name}.tokens.npy", dtype)
        self._learned: _GrowingArray | None = None
        self._ends: list[int] = []
        self.tokens, self._max_id = 0, -1

    def add(self, ids: np.ndarray, learned: np.ndarray | None) -> None:
        if learned is not None and self._learned is None:
            self._learned = _GrowingArray(self._folder / f"{self._name}.learned.npy", np.dtype(np.uint8))
            self._learned.append(np.ones(self.tokens, dtype=np.uint8))  # earlier documents are learned whole
        self._ids.append(ids)
        if self._learned is not None:
            self._learned.append(np.ones(len(ids), dtype=np.uint8) if learned is None else learned)
        self.tokens += len(ids)
        self._ends.append(self.tokens)
        self._max_id = max(self._max_id, int(ids.max()))

    def close(self) -> None:
        for array in (self._ids, self._learned):
            if array is not None:
                array.close()

    def finish(self) -> Shard:
        ends = _GrowingArray(self._folder / f"{self._name}.ends.npy", np.dtype(np.int64))
        ends.append(np.array(self._ends, dtype=np.int64))
        return Shard(
            tokens=self.tokens,
            documents=len(self._ends),
            max_id=self._max_id,
            ids=self._ids.finish(),
            ends=ends.finish(),
            learned=self._learned.finish() if self._learned else None,
        )


class _GrowingArray:
    """A one-dimensional .npy file whose length is known only at the end (numpy pads the header for just that)."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self._dtype, self._length = path, dtype, 0
        self._file = path.open("wb", buffering=1 << 20)
        self._header_bytes = self._write_header(self._file)

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self._dtype).tobytes())
        self._length += len(values)

    def close(self) -> None:
        with suppress(OSError):  # flushing to a full disk fails once more; the first failure is being reported
            self._file.close()

    def finish(self) -> StoredFile:
        self._file.seek(0)
        if self._write_header(self._file) != self._header_bytes:
            raise AssertionError("the .npy header changed its size")
        self._file.close()
        return StoredFile(name=self._path.name, bytes=self._path.stat().st_size, sha256=sha256_of(self._path))

    def _write_header(self, file: IO[bytes]) -> int:
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(file, description)
        return file.tell()


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
