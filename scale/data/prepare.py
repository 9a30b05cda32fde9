"""Raw sources -> token stores, once: read, drop duplicates, divide, tokenise, write; afterwards the cache is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from scale.config.data import DataConfig, PackedSource, RawSource, Source, TextSource, TokensSource
from scale.data import tokenizer as tokenizers
from scale.data.columns import RawDocument
from scale.data.documents import FORMAT, Documents, Manifest, PackedRows, TokenStore
from scale.data.ingest import write_store
from scale.data.sources import describe, documents, place_of, refuse_as_output
from scale.data.splitting import below, hash_of
from scale.data.store import Dtype
from scale.errors import UsageError
from scale.files import new_folder
from scale.sealed import broken_seal, cached_folder, seal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FOLDER = "tokenizer"


@dataclass
class Prepared:
    """One entry per source, in the order of the config. A source with nothing held out has an empty `valid`."""

    names: list[str]
    weights: list[float]
    train: list[Documents]
    valid: list[Documents]
    tokenizer: PreTrainedTokenizerFast | None
    """None if every source is ids without a tokenizer."""

    def positions(self) -> list[int]:
        """Tokens of each source that can be learned: all but the first of each document."""
        return [int(np.maximum(documents.lengths - 1, 0).sum()) for documents in self.train]

    def left_out(self) -> dict[str, dict[str, int]]:
        """What was dropped from each tokenised source, and which of its files were not read, with counts above 0."""
        stores = {n: t for n, t in zip(self.names, self.train, strict=True) if isinstance(t, TokenStore)}
        counts = {name: {why: n for why, n in t.manifest.dropped.items() if n} for name, t in stores.items()}
        return {name: found for name, found in counts.items() if found}

    def fingerprint(self) -> str:
        """Hex digest of what a run learns from and is judged by: the sources in order, their content, the tokenizer.

        Weights are left out: the run's config guards them, and its user may allow a change.
        """
        tokenizer = tokenizers.content_hash(self.tokenizer) if self.tokenizer is not None else None
        content = [documents.fingerprint for documents in (*self.train, *self.valid)]
        return hashlib.sha256(json.dumps([self.names, content, tokenizer]).encode()).hexdigest()


def prepare(config: DataConfig, progress: bool = True) -> Prepared:
    """Open every source, tokenising what the cache does not hold yet. Raises UsageError or ScaleError (disk full, Ctrl-C)."""
    names = config.source_names()
    for source in config.sources:
        if isinstance(source, TextSource):  # which reads every file of a folder
            refuse_as_output(source, config.cache)
    shared = _shared_tokenizer(config, progress)
    pairs = [_open(source, shared, config, progress) for source in config.sources]
    tokenizer = _one_tokenizer(names, pairs, shared)
    for name, (train, valid) in zip(names, pairs, strict=True):
        _check_ids(name, max(train.max_id, valid.max_id), tokenizer)
        if not (train.lengths > 1).any():
            raise UsageError(f"data.sources: {name}: no document to train on has two tokens, so none can be predicted")
    trains, valids = [t for t, _ in pairs], [v for _, v in pairs]
    weights = [1.0 if s.weight is None else s.weight for s in config.sources]
    return Prepared(names, weights, trains, valids, tokenizer)


def is_prepared(config: DataConfig) -> bool:
    """Whether `prepare` would only open what is there, without tokenising anything."""
    if (
        config.tokenizer is not None
        and config.tokenizer.vocab_size is not None
        and not _tokenizer_folder(config).exists()
    ):
        return False
    shared = (
        _shared_tokenizer(config, progress=False) if any(isinstance(s, RawSource) for s in config.sources) else None
    )
    return all(_place(source, shared, config).exists() for source in config.sources)


def tokenize(
    source: RawSource,
    out: str | Path,
    tokenizer: PreTrainedTokenizerFast | None,
    held_out: float = 0.0,
    dtype: Dtype = "auto",
    progress: bool = True,
) -> Manifest:
    """Write a raw source as a token store with its tokenizer into a new folder. Raises UsageError if `out` exists or lies
    in what is read."""
    refuse_as_output(source, out)
    with new_folder(Path(out)) as folder:
        manifest = write_store(folder, source, tokenizer, held_out, dtype, progress)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder / TOKENIZER_FOLDER))
        seal(folder)
        return manifest


def train_tokenizer(sources: list[RawSource], vocab_size: int, held_out: float) -> PreTrainedTokenizerFast:
    """A BPE over the training side of the sources. Raises UsageError if they hold no text."""
    every = (document for source in sources for document in documents(source) if document.text is not None)
    places = ", ".join(map(place_of, sources)) or "data.sources (all are token ids)"
    return tokenizers.train(_training_side(every, held_out), vocab_size, place=places)


def _training_side(every: Iterable[RawDocument], held_out: float) -> Iterator[str]:
    """Texts that are not held out; if the hash holds out all of them, the one with the highest hash, which stays."""
    highest, last_resort = -1, None
    for document in every:
        hash_64 = hash_of(document.content())
        if not below(hash_64, held_out):
            yield str(document.text)
            highest, last_resort = 1 << 64, None
        elif hash_64 > highest:
            highest, last_resort = hash_64, document.text
    if last_resort is not None:
        yield last_resort


def _shared_tokenizer(config: DataConfig, progress: bool) -> PreTrainedTokenizerFast | None:
    """The tokenizer of the config: loaded, or trained on all raw text sources and kept in the cache."""
    if config.tokenizer is None:
        return None
    if config.tokenizer.path is not None:
        return tokenizers.load(config.tokenizer.path)
    vocab_size, fraction = config.tokenizer.vocab_size, config.held_out.fraction
    assert vocab_size is not None
    sources = [s for s in config.sources if isinstance(s, RawSource)]
    folder = _tokenizer_folder(config)

    def write(aside: Path) -> None:
        with Console(stderr=True, quiet=not progress).status(f"training a tokenizer of {vocab_size:,} entries"):
            train_tokenizer(sources, vocab_size, fraction).save_pretrained(str(aside))

    cached_folder(folder, write)
    return tokenizers.load(str(folder))


def _tokenizer_folder(config: DataConfig) -> Path:
    """Where the tokenizer that is trained on the raw sources is kept."""
    assert config.tokenizer is not None
    described = [describe(s) for s in config.sources if isinstance(s, RawSource)]
    key = _key(described, config.tokenizer.vocab_size, config.held_out.fraction)
    return Path(config.cache).expanduser() / f"tokenizer-{key}"


def _place(source: Source, tokenizer: PreTrainedTokenizerFast | None, config: DataConfig) -> Path:
    """The file or folder that a source is opened from."""
    if isinstance(source, PackedSource | TokensSource):
        return Path(source.path).expanduser()
    key = _key(describe(source), tokenizer and tokenizers.content_hash(tokenizer), config.held_out.fraction)
    return Path(config.cache).expanduser() / f"{source.kind}-{key}"


def _open(
    source: Source, tokenizer: PreTrainedTokenizerFast | None, config: DataConfig, progress: bool
) -> tuple[Documents, Documents]:
    """The training and the held-out documents of one source."""
    fraction = config.held_out.fraction
    if isinstance(source, PackedSource):
        return PackedRows.open(source.path, fraction)
    folder = _place(source, tokenizer, config)
    if isinstance(source, TokensSource):
        if damage := broken_seal(folder):
            raise UsageError(f"{damage}; delete the folder and write it again with `scale data tokenize`")
        return TokenStore(folder, "train"), TokenStore(folder, "valid")

    def write(aside: Path) -> None:
        write_store(aside, source, tokenizer, fraction, "auto", progress)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(aside / TOKENIZER_FOLDER))

    cached_folder(folder, write)
    return TokenStore(folder, "train"), TokenStore(folder, "valid")


def _one_tokenizer(
    names: list[str], pairs: list[tuple[Documents, Documents]], shared: PreTrainedTokenizerFast | None
) -> PreTrainedTokenizerFast | None:
    """The one tokenizer that all sources agree on; sources of bare ids have none and agree with any."""
    used = {"data.tokenizer": tokenizers.content_hash(shared)} if shared is not None else {}
    stores = {name: t for name, (t, _) in zip(names, pairs, strict=True) if isinstance(t, TokenStore)}
    used |= {f"source {name} ({s.folder})": s.manifest.tokenizer for name, s in stores.items() if s.manifest.tokenizer}
    for place, content in used.items():
        first = next(iter(used))
        if content != used[first]:
            raise UsageError(
                f"data: {first} has tokenizer {used[first]}, {place} has {content}; all sources must share one: "
                "tokenize them again with the same tokenizer"
            )
    if shared is not None or not used:
        return shared
    store = next(s for s in stores.values() if s.manifest.tokenizer)
    return tokenizers.load(str(store.folder / TOKENIZER_FOLDER))


def _check_ids(name: str, max_id: int, tokenizer: PreTrainedTokenizerFast | None) -> None:
    if tokenizer is not None and max_id >= (size := tokenizers.vocabulary_size(tokenizer)):
        raise UsageError(f"data.sources: {name}: token id {max_id}, but the tokenizer has only {size} entries")


def _key(*parts: object) -> str:
    content = json.dumps([FORMAT, *parts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
