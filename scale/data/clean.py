"""Cleaning rows of text, and dividing them into a training and a validation file without leaks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale.config.data import RawSource
from scale.data.columns import ColumnReader
from scale.data.normalise import normalised
from scale.data.sources import left_out, place_of, refuse_as_output
from scale.data.splitting import hash_of
from scale.data.tables import Row, lacks_answer, read_rows, reader_for
from scale.errors import MissingExtra, UsageError
from scale.files import new_files

EXAMPLES = 3
_SHINGLE = 5
_PERMUTATIONS = 128


@dataclass
class Cleaned:
    """Rows read, kept, changed, and dropped by reason, with the first places of each reason.

    `changes` counts what was changed in the rows that are kept; `left_out` the files that were not read.
    """

    read: int = 0
    kept: int = 0
    changed: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, int] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, example: str) -> None:
        self.dropped[reason] += 1
        if self.dropped[reason] <= EXAMPLES:
            self.examples.setdefault(reason, []).append(example)


def clean(
    source: RawSource, out: str | Path, min_chars: int = 1, max_chars: int | None = None, near: float | None = None
) -> Cleaned:
    """Write the good rows as JSONL: normalised, none empty, too short, too long or a repetition. What cannot be read is
    dropped as well, and all of it counted.

    `near` also drops rows whose estimated Jaccard similarity (5-character shingles, MinHash) to an earlier row reaches it.
    Raises UsageError if `out` is read itself, exists already or nothing is left, MissingExtra without datasketch.
    """
    refuse_as_output(source, out)
    if Path(out).exists():
        raise UsageError(f"{out}: exists already; choose another file or delete it first")
    result = Cleaned(left_out=left_out(source))
    seen: set[bytes] = set()
    similar = NearDuplicates(near) if near is not None else None
    reader: ColumnReader | None = None
    with new_files(Path(out)) as (file,):
        for row in read_rows(source):
            result.read += 1
            if row.values is None:
                result.drop("files that cannot be read (on)" if row.last else "unreadable", str(row.problem))
                continue
            changes: Counter[str] = Counter()
            values = normalised(row.values, changes)
            reader = reader or _text_reader(source, values)
            try:
                text = "" if lacks_answer(values) else (reader.read(values, row.where).text or "").strip()
                line = _line(values, row.where, changes)
            except UsageError as error:
                result.drop("unreadable", str(error))
                continue
            reason = _fault(text, min_chars, max_chars, seen) or (similar.check(text, row.where) if similar else None)
            if reason is not None:
                result.drop(reason, row.where)
                continue
            file.write(line)
            result.kept += 1
            result.changed += bool(changes)
            result.changes += changes
        if not result.kept:
            raise UsageError(f"{place_of(source)}: nothing is left after cleaning {result.read} rows ({_told(result)})")
    return result


def _text_reader(source: RawSource, values: dict[str, Any]) -> ColumnReader:
    reader = reader_for(source, values)
    if reader.columns.text is None:
        raise UsageError(f"{place_of(source)}: holds token ids; cleaning works on text")
    reader.check(values, place_of(source))  # a wrong --text is an error, not a reason to drop every row
    return reader


def _told(result: Cleaned) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in result.dropped.items()) or "there are none"


def _fault(text: str, min_chars: int, max_chars: int | None, seen: set[bytes]) -> str | None:
    if not text:
        return "empty"
    if len(text) < min_chars:
        return f"shorter than {min_chars} characters"
    if max_chars is not None and len(text) > max_chars:
        return f"longer than {max_chars} characters"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if digest in seen:
        return "exact duplicates"
    seen.add(digest)
    return None


class NearDuplicates:
    """Remembers texts by MinHash (datasketch) and recognises what resembles one of them."""

    def __init__(self, threshold: float):
        if not 0 < threshold <= 1:
            raise UsageError(f"--near {threshold}: a similarity above 0 and up to 1, such as 0.8")
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise MissingExtra("--near", "dedup") from None
        self._new = lambda: MinHash(num_perm=_PERMUTATIONS)
        self._index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        self._hashes: dict[str, Any] = {}
        self._threshold = threshold

    def check(self, text: str, where: str) -> str | None:
        """A reason to drop the text, or None after remembering it."""
        flat = " ".join(text.lower().split())
        minhash = self._new()
        minhash.update_batch(
            [s.encode() for s in {flat[i : i + _SHINGLE] for i in range(max(1, len(flat) - _SHINGLE + 1))}]
        )
        if any(self._hashes[c].jaccard(minhash) >= self._threshold for c in self._index.query(minhash)):
            return f"near duplicates ({self._threshold:g})"
        key = f"{where} {len(self._hashes)}"
        self._index.insert(key, minhash)
        self._hashes[key] = minhash
        return None


@dataclass
class Divided:
    """Rows and groups of equal `by` values on each side."""

    train: int
    valid: int
    train_groups: int
    valid_groups: int
    left_out: dict[str, int]
    """Files that were not read."""


def split(source: RawSource, out: str | Path, fraction: float = 0.1, by: str | None = None) -> Divided:
    """Write train.jsonl and valid.jsonl into the folder `out`, in the order of the source, divided by hash.

    Rows with the same content, or with the same value of column `by`, stay on one side. The groups with the lowest hashes
    are held out until `fraction` of the rows is reached. Raises UsageError for broken rows, existing files,
    files that are read themselves, too few groups.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"--fraction {fraction:g}: the share of validation rows, above 0 and below 1, such as 0.1")
    targets = [Path(out) / "train.jsonl", Path(out) / "valid.jsonl"]
    refuse_as_output(source, *targets)
    for target in targets:
        if target.exists():
            raise UsageError(f"{target}: exists already; choose another folder or delete it first")
    groups = Counter(_group(row, by) for row in _sound_rows(source))
    held_out = _lowest(groups, fraction, place_of(source), by)
    with new_files(*targets) as (train, valid):
        for row in _sound_rows(source):
            side = valid if _group(row, by) in held_out else train
            side.write(row.raw + b"\n" if row.raw is not None else _line(row.values, row.where, Counter()))
    rows = sum(groups[g] for g in held_out)
    return Divided(groups.total() - rows, rows, len(groups) - len(held_out), len(held_out), left_out(source))


def _sound_rows(source: RawSource) -> Iterator[Row]:
    for row in read_rows(source):
        if row.values is None:
            raise UsageError(f"{row.problem}; `scale data clean` drops such rows")
        yield row


def _group(row: Row, by: str | None) -> int:
    assert row.values is not None
    if by is not None and by not in row.values:
        raise UsageError(f"{row.where}: --by {by}: no such column; there are: {', '.join(row.values) or 'none'}")
    value = row.values if by is None else row.values[by]
    return hash_of(json.dumps(value, sort_keys=True, default=str).encode())


def _lowest(groups: Counter[int], fraction: float, place: str, by: str | None) -> set[int]:
    if len(groups) < 2:
        what = f"value of column {by!r}" if by else "distinct row"
        raise UsageError(f"{place}: cannot be divided: it has {len(groups)} {what}{'s' if not groups else ''}")
    wanted, rows = fraction * groups.total(), 0
    held_out: set[int] = set()
    for group in sorted(groups)[:-1]:
        if held_out and rows + groups[group] > wanted:
            break
        held_out.add(group)
        rows += groups[group]
    return held_out


def _line(values: Any, where: str, changes: Counter[str]) -> bytes:
    """A row of JSONL. Values that JSON does not know are written as text and counted. Raises UsageError for bytes, and for
    text that no UTF-8 can hold."""

    def as_text(value: Any) -> str:
        if isinstance(value, bytes):
            raise UsageError(
                f"{where}: holds bytes ({value[:10]!r}), which JSON cannot hold; choose or drop columns first"
            )
        changes[f"values of type {type(value).__name__} (to text)"] += 1
        return str(value)

    try:
        return json.dumps(values, ensure_ascii=False, default=as_text).encode() + b"\n"
    except UnicodeEncodeError as error:
        broken = f"\\u{ord(error.object[error.start]):04x}"
        raise UsageError(f"{where}: text holds {broken}, half of a surrogate pair") from None
