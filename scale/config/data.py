"""What to train on: sources, tokenizer, packing, lengths, held-out part."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scale.config.base import NUMBER, Count, Name, Positive, Strict, exactly_one


class Columns(Strict):
    """Which columns hold what. Give `text`, or `input_ids` for data that is tokenised already."""

    text: str | None = None
    """Column with the text, or a template over columns such as "{title}\\n{body}"."""
    input_ids: str | None = None
    """Column with token ids."""
    labels: str | None = None
    """Column aligned with `input_ids` in which -100 marks tokens that are not learned (Hugging Face convention)."""

    @model_validator(mode="after")
    def _check(self) -> Columns:
        exactly_one(self, "text", "input_ids")
        if self.labels is not None and self.input_ids is None:
            raise ValueError("labels need input_ids")
        return self


class _Source(Strict):
    name: Name | None = None
    """Name in logs and metrics; default: kind and position."""
    weight: Positive | None = None
    """Share of the training tokens, relative to the other sources; default: 1. With `train.epochs` and no weight at any
    source, the size of the source, so that each is seen as often."""


class StdlibSource(_Source):
    """The .py files of the running interpreter's standard library: real text on every machine, no download."""

    kind: Literal["python-stdlib"]


class TextSource(_Source):
    """Plain UTF-8 text files."""

    kind: Literal["text"]
    path: str
    """File, folder or glob such as "corpus/**/*.txt"; also compressed (.gz, .bz2, .xz, .zst)."""
    split: Literal["file", "paragraph", "line"] = "file"
    """What one document is. Documents never straddle the training and the held-out part."""


class JsonlSource(_Source):
    """JSON objects, one per line."""

    kind: Literal["jsonl"]
    path: str
    """File, folder or glob such as "corpus/*.jsonl"; also compressed (.gz, .bz2, .xz, .zst)."""
    columns: Columns = Columns(text="text")
    """Which columns hold what."""


class CsvSource(_Source):
    """CSV or TSV files whose first line names the columns."""

    kind: Literal["csv"]
    path: str
    """File, folder or glob such as "corpus/*.csv"; also compressed (.gz, .bz2, .xz, .zst)."""
    columns: Columns = Columns(text="text")
    """Which columns hold what. All of them are text."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """The character between two fields; default: a tab in .tsv files, else a comma."""


class ParquetSource(_Source):
    """Parquet files."""

    kind: Literal["parquet"]
    path: str
    """File, folder or glob such as "corpus/*.parquet"."""
    columns: Columns = Columns(text="text")
    """Which columns hold what."""


class HuggingFaceSource(_Source):
    """A dataset of the Hugging Face hub or one saved with `save_to_disk`."""

    kind: Literal["huggingface"]
    path: str
    """Hub name (org/name) or local folder."""
    config: str | None = None
    """Configuration of the dataset on the hub."""
    split: str = "train"
    """Which split of the dataset to read."""
    streaming: bool = False
    """Read without downloading everything first; needs `max_documents`."""
    max_documents: Count | None = None
    """Stop after this many documents."""
    columns: Columns = Columns(text="text")
    """Which columns hold what."""

    @model_validator(mode="after")
    def _check(self) -> HuggingFaceSource:
        if self.streaming and self.max_documents is None:
            raise ValueError("streaming needs max_documents (a stream may have no end)")
        return self


class TokensSource(_Source):
    """A folder written by `scale data tokenize`."""

    kind: Literal["tokens"]
    path: str
    """The folder."""


class PackedSource(_Source):
    """An .npy array of token ids, N rows x seq_len, uint16, uint32 or int64. Each row is one document."""

    kind: Literal["packed"]
    path: str
    """The file."""


Source = Annotated[
    StdlibSource
    | TextSource
    | JsonlSource
    | CsvSource
    | ParquetSource
    | HuggingFaceSource
    | TokensSource
    | PackedSource,
    Field(discriminator="kind"),
]
FileSource = TextSource | JsonlSource | CsvSource | ParquetSource
RawSource = StdlibSource | FileSource | HuggingFaceSource


class TokenizerConfig(Strict):
    """Either an existing tokenizer or a byte-level BPE trained on the sources."""

    path: str | None = None
    """Folder, tokenizer.json or Hugging Face name of an existing tokenizer."""
    vocab_size: Annotated[Count, Field(ge=258, le=2**20)] | None = None
    """Train a byte-level BPE with this many entries."""

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        exactly_one(self, "path", "vocab_size")
        return self


class Lesson(Strict):
    """Train at `seq_len` until this fraction of the run."""

    until: Annotated[float, NUMBER, Field(gt=0, lt=1)]
    """Fraction of the run at which this lesson ends."""
    seq_len: Count
    """Tokens per row during it; divides data.seq_len."""


class HeldOut(Strict):
    """Documents that are never trained on, chosen by the hash of their content."""

    fraction: Annotated[float, NUMBER, Field(ge=0, lt=1)] = 0.01
    """Share of the documents of each raw source."""


class DataConfig(Strict):
    """Sources are tokenised once into memory-mapped shards under `cache` and read from there."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """What is read; the weights say in which proportion."""
    tokenizer: TokenizerConfig | None = None
    """Needed where a source is raw text; tokenised sources bring their own."""
    seq_len: Annotated[Count, Field(ge=2)] = 1024
    """Tokens per row (the longest, if there is a curriculum)."""
    curriculum: list[Lesson] = []
    """Shorter rows early on, e.g. [{until: 0.4, seq_len: 512}, {until: 0.7, seq_len: 1024}]; tokens per step stay constant."""
    packing: Literal["best-fit", "concat"] = "best-fit"
    """best-fit: whole documents side by side, cut only if longer than a row. concat: one endless stream cut at row ends."""
    cross_documents: bool = False
    """Let attention and positions run across the documents of a row."""
    held_out: HeldOut = HeldOut()
    workers: Annotated[int, NUMBER, Field(ge=0, le=64)] = 1
    """Processes that prepare batches ahead (0: in the training process). Batches do not depend on it."""
    cache: str = "data/cache"
    """Where tokenised sources are kept, one folder per (source, tokenizer)."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        last_until, last_len = 0.0, 0
        for lesson in self.curriculum:
            if lesson.until <= last_until or lesson.seq_len <= last_len:
                raise ValueError("curriculum: `until` and `seq_len` must both rise from lesson to lesson")
            last_until, last_len = lesson.until, lesson.seq_len
        if last_len >= self.seq_len:
            raise ValueError(
                f"curriculum: the last lesson's seq_len {last_len} must be below data.seq_len {self.seq_len}"
            )
        for lesson in self.curriculum:
            if self.seq_len % lesson.seq_len:
                raise ValueError(f"curriculum: seq_len {lesson.seq_len} must divide data.seq_len {self.seq_len}")
        raw = [s for s in self.sources if isinstance(s, RawSource)]
        if self.tokenizer is None and any(getattr(s, "columns", None) is None or s.columns.text for s in raw):  # type: ignore[union-attr]
            raise ValueError(
                "tokenizer: needed because a source is raw text (give tokenizer.path or tokenizer.vocab_size)"
            )
        names = self.source_names()
        if len(set(names)) != len(names):
            raise ValueError(f"sources: names must differ (got {', '.join(names)})")
        return self

    def source_names(self) -> list[str]:
        """One name per source, as used in metrics."""
        kinds = [s.kind for s in self.sources]
        return [s.name or (s.kind if kinds.count(s.kind) == 1 else f"{s.kind}-{i}") for i, s in enumerate(self.sources)]
