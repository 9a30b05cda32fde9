"""Looking at data: validate says what is wrong with it, inspect what is in it. `clean` and `split` change it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scale.config.data import PackedSource, RawSource, Source, TokensSource
from scale.data import tokenizer as tokenizers
from scale.data.clean import Cleaned, Divided, clean, split
from scale.data.columns import ColumnReader, RawDocument
from scale.data.documents import Documents, PackedRows, TokenStore, read_manifest
from scale.data.prepare import TOKENIZER_FOLDER
from scale.data.sources import left_out, place_of
from scale.data.store import sha256_of
from scale.data.tables import lacks_answer, read_rows, reader_for, source_from
from scale.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Cleaned", "Divided", "Inspected", "Validated", "clean", "inspect", "source_from", "split", "validate"]

MOST_PROBLEMS = 20
_SAMPLE_CHARACTERS = 400


@dataclass
class Validated:
    """`problems` are errors (the first 20 of `counts["invalid"]`); duplicates and empty rows are only counted."""

    kind: str
    counts: dict[str, int]
    problems: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    """Files that were not read."""

    @property
    def ok(self) -> bool:
        return not self.problems


def validate(source: Source) -> Validated:
    """Read everything once and report. A token store: sizes and hashes of its files. Raw data: encoding, JSON, columns,
    types, empty and repeated rows; rows with prompt and completion also repeated prompts.
    """
    if isinstance(source, TokensSource):
        return _validate_store(Path(source.path).expanduser())
    if isinstance(source, PackedSource):
        rows, _ = PackedRows.open(source.path, 0.0)
        return Validated("packed", {"rows": len(rows.lengths), "tokens": rows.tokens, "largest id": rows.max_id})
    return _RowChecks(source).run()


def _validate_store(folder: Path) -> Validated:
    manifest = read_manifest(folder)
    counts: Counter[str] = Counter()
    problems = []
    for shard in manifest.train + manifest.valid:
        counts.update(shards=1, documents=shard.documents, tokens=shard.tokens)
        for file in shard.files():
            if sha256_of(folder / file.name) != file.sha256:
                problems.append(f"{folder / file.name}: content differs from its hash in the manifest; tokenize again")
    if manifest.tokenizer is not None:
        found = tokenizers.content_hash(tokenizers.load(str(folder / TOKENIZER_FOLDER)))
        if found != manifest.tokenizer:
            problems.append(
                f"{folder / TOKENIZER_FOLDER}: is tokenizer {found}, but the ids come from {manifest.tokenizer}"
            )
    return Validated("tokens", dict(counts), problems)


class _RowChecks:
    """Counts what is wrong in the rows of a raw source."""

    def __init__(self, source: RawSource):
        self._source = source
        self._reader: ColumnReader | None = None
        self._seen: set[bytes] = set()
        self._prompts: set[bytes] = set()
        self._counts: Counter[str] = Counter({"rows": 0, "invalid": 0, "empty": 0, "duplicates": 0})
        self._problems: list[str] = []

    def run(self) -> Validated:
        for row in read_rows(self._source):
            self._counts["rows"] += 1
            try:
                if row.values is None:
                    raise UsageError(str(row.problem))
                self._reader = self._reader or reader_for(self._source, row.values)
                self._check(row.values, self._reader.read(row.values, row.where), row.where)
            except UsageError as error:
                self._counts["invalid"] += 1
                if len(self._problems) < MOST_PROBLEMS:
                    self._problems.append(str(error))
        if not self._counts["rows"]:
            self._problems.append(f"{place_of(self._source)}: holds no rows (the data is empty)")
        return Validated(self._source.kind, dict(self._counts), self._problems, left_out(self._source))

    def _check(self, values: dict[str, Any], document: RawDocument, where: str) -> None:
        mask = b"" if document.learned is None else document.learned.tobytes()
        self._counts["duplicates"] += not _first_time(document.content() + mask, self._seen)
        if "prompt" in values and "completion" in values:
            self._check_question(values, where)
        elif not document.content().strip():
            self._counts["empty"] += 1
        if document.learned is not None and not document.learned.any():
            self._counts["nothing to learn"] += 1

    def _check_question(self, values: dict[str, Any], where: str) -> None:
        """{prompt, completion, metadata}: two texts and an optional object."""
        for name in ("prompt", "completion"):
            if not isinstance(values[name], str):
                raise UsageError(f"{where}: column {name!r} is not text")
        if not isinstance(values.get("metadata", {}), dict):
            raise UsageError(f"{where}: column 'metadata' is not an object")
        self._counts["empty"] += lacks_answer(values)
        self._counts["repeated prompts"] += not _first_time(values["prompt"].encode(), self._prompts)


def _first_time(content: bytes, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(content, digest_size=16).digest()
    new = digest not in seen
    seen.add(digest)
    return new


@dataclass
class Inspected:
    """What a source holds. `histogram`: (from, to, documents) in `unit`s; `fields`: column -> {type: rows}."""

    kind: str
    facts: dict[str, Any]
    unit: str
    histogram: list[tuple[int, int, int]]
    quantiles: dict[str, int]
    fields: dict[str, dict[str, int]]
    samples: list[str]
    left_out: dict[str, int] = field(default_factory=dict)
    """Files that were not read."""


def inspect(source: Source, tokenizer: str | None = None, samples: int = 3) -> Inspected:
    """Counts, lengths (in tokens where there is a tokenizer, else characters), columns and the first documents."""
    if isinstance(source, TokensSource):
        return _inspect_store(Path(source.path).expanduser(), samples)
    if isinstance(source, PackedSource):
        rows, _ = PackedRows.open(source.path, 0.0)
        facts = {"documents": len(rows.lengths), "tokens": rows.tokens, "largest id": rows.max_id}
        text = tokenizers.load(tokenizer) if tokenizer else None
        return Inspected("packed", facts, "tokens", *_lengths(rows.lengths), {}, _decoded(rows, text, samples))
    return _inspect_rows(source, tokenizer, samples)


def _inspect_store(folder: Path, samples: int) -> Inspected:
    train, valid = TokenStore(folder, "train"), TokenStore(folder, "valid")
    manifest = train.manifest
    tokenizer = tokenizers.load(str(folder / TOKENIZER_FOLDER)) if manifest.tokenizer else None
    facts = {
        "documents (train)": len(train.lengths),
        "documents (valid)": len(valid.lengths),
        "tokens (train)": train.tokens,
        "tokens (valid)": valid.tokens,
        "type": manifest.dtype,
        "vocabulary": manifest.vocab_size,
        "largest id": manifest.max_id,
        "tokenizer": manifest.tokenizer,
        **{f"dropped: {why}": n for why, n in manifest.dropped.items()},
    }
    lengths = np.concatenate([train.lengths, valid.lengths])
    return Inspected("tokens", facts, "tokens", *_lengths(lengths), {}, _decoded(train, tokenizer, samples))


def _decoded(documents: Documents, tokenizer: PreTrainedTokenizerFast | None, samples: int) -> list[str]:
    shown = []
    for doc in range(min(samples, len(documents.lengths))):
        ids = documents.ids(doc, 0, min(int(documents.lengths[doc]), _SAMPLE_CHARACTERS))
        shown.append(str(ids.tolist() if tokenizer is None else tokenizer.decode(ids))[:_SAMPLE_CHARACTERS])
    return shown


def _inspect_rows(source: RawSource, tokenizer: str | None, samples: int) -> Inspected:
    encode = tokenizers.Encoder(tokenizers.load(tokenizer)) if tokenizer else None
    reader: ColumnReader | None = None
    lengths, shown, broken = list[int](), list[str](), 0
    fields: dict[str, Counter[str]] = {}
    for row in read_rows(source):
        try:
            if row.values is None:
                raise UsageError(str(row.problem))
            reader = reader or reader_for(source, row.values)
            document = reader.read(row.values, row.where)
        except UsageError:
            broken += 1
            continue
        for name, value in row.values.items():
            fields.setdefault(name, Counter())[type(value).__name__] += 1
        if document.text is None:
            assert document.ids is not None
            lengths.append(len(document.ids))
        else:
            lengths.append(len(encode([document.text])[0]) if encode else len(document.text))
        if len(shown) < samples:
            shown.append(str(document.text if document.text is not None else document.ids)[:_SAMPLE_CHARACTERS])
    if not lengths:
        raise UsageError(f"{place_of(source)}: no readable rows; `scale data validate` says why")
    in_tokens = encode is not None or (reader is not None and reader.columns.text is None)
    unit = "tokens" if in_tokens else "characters"
    facts = {"rows": len(lengths) + broken, "unreadable rows": broken, unit: sum(lengths)}
    columns = {name: dict(types) for name, types in fields.items()}
    return Inspected(source.kind, facts, unit, *_lengths(lengths), columns, shown, left_out(source))


def _lengths(lengths: Iterable[int]) -> tuple[list[tuple[int, int, int]], dict[str, int]]:
    """Documents per power-of-two class of length, and quantiles."""
    values = np.asarray(list(lengths), dtype=np.int64)
    if not len(values):
        return [], {}
    classes = np.array([int(v).bit_length() for v in values])  # class c holds 2^(c-1) .. 2^c - 1
    counts = np.bincount(classes)
    first = int(classes.min())
    histogram = [(1 << c >> 1, (1 << c) - 1, int(counts[c])) for c in range(first, len(counts))]
    points = {"min": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "max": 1.0}
    return histogram, {name: int(np.quantile(values, q, method="nearest")) for name, q in points.items()}
