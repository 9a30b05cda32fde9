"""The read side of prepared data: documents of token ids, memory-mapped, one split of one source at a time."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ValidationError

from scale.data.splitting import hash_of, held_out_mask
from scale.errors import UsageError

Split = Literal["train", "valid"]
MANIFEST = "manifest.json"
FORMAT = 3
_CHUNK_TOKENS = 1 << 24


class Documents(Protocol):
    """One split of one source. Picklable: memory maps are reopened after unpickling."""

    lengths: np.ndarray
    """(N,) int64: tokens of each document, start and end tokens included."""
    max_id: int
    """Largest token id (-1 if there is none)."""
    fingerprint: str
    """Hex digest of the content; the same wherever the data lie."""

    @property
    def tokens(self) -> int: ...

    def ids(self, doc: int, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64: token ids of one document from `start` to before `stop`."""
        ...

    def learned(self, doc: int, start: int, stop: int) -> np.ndarray | None:
        """(stop - start,) bool: may this token be a target? None: every token may."""
        ...


class StoredFile(BaseModel):
    """One array file with what it must measure."""

    name: str
    bytes: int
    sha256: str


class Shard(BaseModel):
    """About 100M tokens: ids, document ends (int64, exclusive), and which tokens are learned (uint8) where not all are."""

    tokens: int
    documents: int
    max_id: int
    ids: StoredFile
    ends: StoredFile
    learned: StoredFile | None = None

    def files(self) -> list[StoredFile]:
        return [f for f in (self.ids, self.ends, self.learned) if f is not None]


class Manifest(BaseModel):
    """What lies in a token store and where it came from."""

    version: int
    dtype: Literal["uint16", "uint32"]
    vocab_size: int | None
    eos_id: int | None
    max_id: int
    tokenizer: str | None
    """Content hash of the tokenizer in `tokenizer/`; None for ids that came without one."""
    source: dict[str, Any]
    held_out: float
    dropped: dict[str, int]
    train: list[Shard]
    valid: list[Shard]


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `folder`/manifest.json with the hash of its own content."""
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest.model_dump(mode="json")))


def manifest_bytes(body: dict[str, Any]) -> bytes:
    """The one spelling of a manifest, so that any changed byte shows."""
    content = json.dumps(body, sort_keys=True)
    whole = body | {"sha256": sha256(content.encode()).hexdigest()}
    return (json.dumps(whole, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json and the sizes of the files it names. Raises UsageError."""
    place = folder / MANIFEST
    if not place.is_file():
        raise UsageError(f"{folder}: not a token store (no {MANIFEST}); write one with `scale data tokenize`")
    try:
        raw = place.read_bytes()
        content = json.loads(raw)
    except (OSError, ValueError):
        raise UsageError(f"{place}: not readable as JSON; write the store again with `scale data tokenize`") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != FORMAT:
        raise UsageError(f"{place}: format version {version!r}, but this program reads {FORMAT}; tokenize again")
    content.pop("sha256", None)
    if manifest_bytes(content) != raw:
        raise UsageError(f"{place}: its content does not match its own SHA-256; the file is damaged, tokenize again")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise UsageError(f"{place}: {at}: {first['msg']}; the file is damaged, tokenize again") from None
    for shard in manifest.train + manifest.valid:
        for file in shard.files():
            _check_size(folder / file.name, file)
    return manifest


def _check_size(path: Path, file: StoredFile) -> None:
    if Path(file.name).name != file.name:
        raise UsageError(f"{path.parent / MANIFEST}: file name {file.name!r} leaves the folder")
    if not path.is_file():
        raise UsageError(f"{path}: missing from its token store; delete the folder and tokenize again")
    size = path.stat().st_size
    if size != file.bytes:
        raise UsageError(
            f"{path}: {size} bytes instead of {file.bytes} (cut off?); delete the folder and tokenize again"
        )


class TokenStore:
    """One split of a folder written by `scale data tokenize` or by the cache. Raises UsageError if it is damaged."""

    def __init__(self, folder: str | Path, split: Split):
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        self._shards: list[Shard] = getattr(self.manifest, split)
        self.max_id = max((s.max_id for s in self._shards), default=-1)
        self.fingerprint = sha256(" ".join(f.sha256 for s in self._shards for f in s.files()).encode()).hexdigest()
        self._ends = [_open(self.folder / s.ends.name) for s in self._shards]
        self._ids = [_open(self.folder / s.ids.name) for s in self._shards]
        self._learned = [_open(self.folder / s.learned.name) if s.learned else None for s in self._shards]
        self._first_doc = np.cumsum([0] + [s.documents for s in self._shards])
        empty = np.zeros(0, dtype=np.int64)
        self.lengths = np.concatenate([empty, *(np.diff(ends, prepend=0) for ends in self._ends)])

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self._shards)

    def ids(self, doc: int, start: int, stop: int) -> np.ndarray:
        shard, offset = self._locate(doc, start, stop)
        return self._ids[shard][offset + start : offset + stop].astype(np.int64)

    def learned(self, doc: int, start: int, stop: int) -> np.ndarray | None:
        shard, offset = self._locate(doc, start, stop)
        flags = self._learned[shard]
        return None if flags is None else flags[offset + start : offset + stop].astype(bool)

    def _locate(self, doc: int, start: int, stop: int) -> tuple[int, int]:
        """The shard of a document and where the document begins in it."""
        _check_range(doc, start, stop, self.lengths)
        shard = int(np.searchsorted(self._first_doc, doc, side="right")) - 1
        local = doc - int(self._first_doc[shard])
        return shard, int(self._ends[shard][local - 1]) if local else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder, self.split)


class PackedRows:
    """Rows of an .npy array (N, seq_len) of token ids, read in place; each row is one document, every token learned.

    Opening reads the array once: it finds the largest id, and which rows are held out (by the hash of their content).
    Raises UsageError for another shape or dtype, negative ids, or too few rows to hold any out.
    """

    def __init__(self, path: str | Path, rows: np.ndarray, max_id: int, fingerprint: str):
        self.path, self._rows, self.max_id, self.fingerprint = Path(path), rows, max_id, fingerprint
        self._array = _open(self.path)
        self.lengths = np.full(len(rows), self._array.shape[1], dtype=np.int64)

    @classmethod
    def open(cls, path: str | Path, held_out: float) -> tuple[PackedRows, PackedRows]:
        """The training and the held-out rows of one array."""
        array = _open(Path(path).expanduser())
        place = f"{path}: {array.dtype} array of shape {array.shape}"
        if array.ndim != 2 or 0 in array.shape:
            raise UsageError(f"{place}: expected rows x seq_len, with at least one of each")
        if array.dtype not in (np.uint16, np.uint32, np.int64):
            raise UsageError(f"{place}: expected uint16, uint32 or int64 token ids")
        hashes = np.empty(len(array), dtype=np.uint64)
        row_max = np.empty(len(array), dtype=np.int64)
        step = max(1, _CHUNK_TOKENS // array.shape[1])
        for first in range(0, len(array), step):
            chunk = array[first : first + step].astype(np.int64)
            if chunk.min() < 0:
                row = first + int(np.argmax(chunk.min(axis=1) < 0))
                raise UsageError(f"{path}: row {row}: token id {chunk.min(axis=1)[row - first]} is negative")
            row_max[first : first + step] = chunk.max(axis=1)
            hashes[first : first + step] = [hash_of(row.tobytes()) for row in chunk]
        held = held_out_mask(hashes, held_out, str(path))
        sides = (np.flatnonzero(~held), np.flatnonzero(held))
        train, valid = (
            cls(
                Path(path).expanduser(),
                rows,
                max_id=int(row_max[rows].max(initial=-1)),
                fingerprint=sha256(hashes[rows].astype("<u8").tobytes()).hexdigest(),
            )
            for rows in sides
        )
        return train, valid

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def ids(self, doc: int, start: int, stop: int) -> np.ndarray:
        _check_range(doc, start, stop, self.lengths)
        return self._array[self._rows[doc], start:stop].astype(np.int64)

    def learned(self, doc: int, start: int, stop: int) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedRows, (self.path, self._rows, self.max_id, self.fingerprint)


def _check_range(doc: int, start: int, stop: int, lengths: np.ndarray) -> None:
    """A wrong slice would silently read the neighbouring document."""
    if not (0 <= doc < len(lengths) and 0 <= start <= stop <= lengths[doc]):
        raise IndexError(f"document {doc}, tokens {start}:{stop}: there are {len(lengths)} documents")


def _open(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path}: not a complete .npy array ({error})") from None
