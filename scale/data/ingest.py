"""The pipeline from raw documents to a token store: read -> drop duplicates -> tokenise on all cores -> divide -> write."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scale.config.data import RawSource
from scale.data.columns import RawDocument
from scale.data.documents import Manifest, Split
from scale.data.sources import describe, documents, left_out, place_of
from scale.data.splitting import below, hash_of, too_few
from scale.data.store import Dtype, StoreWriter, choose_dtype
from scale.data.tokenizer import Encoder, content_hash, vocabulary_size
from scale.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH_DOCUMENTS = 4096
_BATCH_BYTES = 8_000_000

DUPLICATE, EMPTY, NOTHING_LEARNED = "exact duplicates", "empty", "nothing to learn"
UNKNOWN = "words or characters that the tokenizer does not know"


class Tokenised(NamedTuple):
    """A document ready to be written."""

    where: str
    hash: int
    ids: np.ndarray
    learned: np.ndarray | None


def write_store(
    folder: Path,
    source: RawSource,
    tokenizer: PreTrainedTokenizerFast | None,
    held_out: float,
    dtype: Dtype,
    progress: bool,
) -> Manifest:
    """Write the shards and the manifest of a raw source into `folder`. Raises UsageError for unusable data."""
    place = place_of(source)
    vocab_size = vocabulary_size(tokenizer) if tokenizer is not None else None
    description = describe(source)  # before reading: a file that changes meanwhile then gets another cache entry
    dropped = Counter({DUPLICATE: 0, EMPTY: 0, NOTHING_LEARNED: 0, **left_out(source)})
    with closing(StoreWriter(folder, choose_dtype(dtype, vocab_size))) as writer:
        divider = Divider(held_out, writer)
        with _progress_bar(place, progress) as advance:
            for document in _tokenised(_distinct(documents(source), dropped), tokenizer, place, dropped):
                _check_ids(document, vocab_size)
                if _learnable(document):
                    divider.add(document)
                    advance(len(document.ids))
                else:
                    dropped[NOTHING_LEARNED] += 1
        if not divider.documents:
            counts = ", ".join(f"{n} {why}" for why, n in dropped.items() if n)
            raise UsageError(
                f"{place}: no document has a token to learn from ({counts}); labels all -100, or texts empty?"
            )
        divider.finish(place)
        return writer.finish(
            vocab_size=vocab_size,
            eos_id=tokenizer.eos_token_id if tokenizer is not None else None,
            tokenizer=content_hash(tokenizer) if tokenizer is not None else None,
            source=description,
            held_out=held_out,
            dropped=dict(dropped),
        )


def _distinct(every: Iterable[RawDocument], dropped: Counter[str]) -> Iterator[RawDocument]:
    """Documents that are neither empty nor repeat an earlier one. Remembers 16 bytes of each."""
    seen: set[bytes] = set()
    for document in every:
        if document.text is not None and not document.text.strip():
            dropped[EMPTY] += 1
            continue
        mask = b"" if document.learned is None else document.learned.tobytes()
        digest = hashlib.blake2b(document.content() + mask, digest_size=16).digest()
        if digest in seen:
            dropped[DUPLICATE] += 1
            continue
        seen.add(digest)
        yield document


def _batches(every: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    batch: list[RawDocument] = []
    size = 0
    for document in every:
        batch.append(document)
        size += len(document.content())
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenised(
    every: Iterable[RawDocument], tokenizer: PreTrainedTokenizerFast | None, place: str, dropped: Counter[str]
) -> Iterator[Tokenised]:
    """Ids of each document; text gets its start and its end token, given ids stay as they are. Counts what is unknown."""
    encoder = Encoder(tokenizer) if tokenizer is not None else None
    for batch in _batches(every):
        texts = [d.text for d in batch if d.text is not None]
        if texts and encoder is None:
            raise UsageError(f"{place}: is text and needs a tokenizer (data.tokenizer, or --tokenizer)")
        encoded = iter(encoder(texts) if encoder is not None else [])
        if encoder is not None and encoder.unknown:
            dropped[UNKNOWN] = encoder.unknown
        for document in batch:
            ids = document.ids
            if ids is None:
                ids = np.array(next(encoded), dtype=np.int64)
            yield Tokenised(document.where, hash_of(document.content()), ids, document.learned)


def _check_ids(document: Tokenised, vocab_size: int | None) -> None:
    largest = int(document.ids.max(initial=-1))
    if vocab_size is not None and largest >= vocab_size:
        raise UsageError(f"{document.where}: token id {largest}, but the tokenizer has only {vocab_size} entries")


def _learnable(document: Tokenised) -> bool:
    """A first token has nothing before it to be predicted from."""
    if document.learned is None:
        return len(document.ids) > 1
    return bool(document.learned[1:].any())


class Divider:
    """Sends documents to train or valid by their hash, and sees to it that neither side stays empty.

    While a side is empty, the document closest to it is kept back; it changes sides if nothing better comes.
    """

    def __init__(self, fraction: float, writer: StoreWriter):
        self._fraction, self._writer = fraction, writer
        self._reserve: Tokenised | None = None
        self._seen: set[Split] = set()
        self.documents = 0

    def add(self, document: Tokenised) -> None:
        side: Split = "valid" if below(document.hash, self._fraction) else "train"
        self.documents += 1
        self._seen.add(side)
        if self._fraction == 0 or len(self._seen) == 2:
            self._write(side, document)
            return
        kept = self._reserve
        if kept is None or (document.hash < kept.hash) == (side == "train"):
            self._reserve, document_to_write = document, kept
        else:
            document_to_write = document
        if document_to_write is not None:
            self._write(side, document_to_write)

    def finish(self, place: str) -> None:
        """Place the document that was kept back: on its own side if the other has got one, else on the other."""
        if self._reserve is None:
            return
        if self.documents == 1:
            raise too_few(self._fraction, place)
        own_side: Split = "valid" if below(self._reserve.hash, self._fraction) else "train"
        other_side: Split = "train" if own_side == "valid" else "valid"
        self._write(own_side if len(self._seen) == 2 else other_side, self._reserve)

    def _write(self, side: Split, document: Tokenised) -> None:
        self._writer.add(side, document.ids, document.learned, document.where)


@contextmanager
def _progress_bar(place: str, show: bool) -> Iterator[Callable[[int], None]]:
    """A function to call with the tokens of each document."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("tokenising {task.description}"),
        TextColumn("{task.fields[documents]:,} documents, {task.completed:,} tokens"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(place, total=None, documents=0)
        count = 0

        def advance(tokens: int) -> None:
            nonlocal count
            count += 1
            bar.update(task, advance=tokens, documents=count)

        yield advance
