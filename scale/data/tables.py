"""What the data tools read: a SOURCE argument as a config, and its rows one by one, broken ones included."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from scale.config.data import (
    Columns,
    HuggingFaceSource,
    JsonlSource,
    PackedSource,
    ParquetSource,
    RawSource,
    Source,
    StdlibSource,
    TextSource,
    TokensSource,
)
from scale.data.columns import ColumnReader
from scale.data.documents import MANIFEST
from scale.data.files import find_files
from scale.data.sources import byte_lines, documents, parquet_rows, parse_object, place_of, rows
from scale.errors import UsageError

_ENDINGS = {".jsonl": "jsonl", ".parquet": "parquet", ".npy": "packed", ".txt": "text", ".md": "text", ".py": "text"}
_SOURCE: TypeAdapter[Source] = TypeAdapter(Source)


@dataclass
class Row:
    """One row: its values, or why it cannot be read. `raw` is the line of a JSONL file."""

    where: str
    values: dict[str, Any] | None
    problem: str | None = None
    raw: bytes | None = None


def source_from(argument: str, kind: str | None = None, **options: Any) -> Source:
    """A SOURCE argument: a path, `python-stdlib` or `hf:org/name`. Raises UsageError if the kind cannot be told."""
    if argument.startswith("hf:"):
        kind, argument = kind or "huggingface", argument.removeprefix("hf:")
    elif argument == "python-stdlib":
        kind = kind or "python-stdlib"
    kind = kind or _kind_of(argument)
    given = {k: v for k, v in options.items() if v is not None}
    content = {"kind": kind} | ({} if kind == "python-stdlib" else {"path": argument}) | given
    try:
        return _SOURCE.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"][1:])
        message = f"a {kind} source has no such option" if first["type"] == "extra_forbidden" else first["msg"]
        raise UsageError(f"{argument}: {at + ': ' if at else ''}{message.removeprefix('Value error, ')}") from None


def _kind_of(path: str) -> str:
    folder = Path(path).expanduser()
    if (folder / MANIFEST).is_file():
        return "tokens"
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "huggingface"
    endings = {p.suffix for p in find_files(path)}
    kinds = {_ENDINGS.get(ending) for ending in endings}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        raise UsageError(f"{path}: cannot tell what it is from the endings {', '.join(sorted(endings))!r}; give --kind")
    return kind


def raw_source(source: Source, tool: str) -> RawSource:
    """Raises UsageError for sources that are token ids already."""
    if isinstance(source, TokensSource | PackedSource):
        raise UsageError(f"{source.path}: {tool} works on text or rows, not on {source.kind}")
    return source


def read_rows(source: RawSource) -> Iterator[Row]:
    """Every row. A broken line of JSONL is one row with a problem; any other broken file ends there with one."""
    if isinstance(source, JsonlSource):
        for path in find_files(source.path, ".jsonl"):
            yield from _jsonl(path)
    elif isinstance(source, ParquetSource):
        for path in find_files(source.path, ".parquet"):
            yield from _guarded(str(path), parquet_rows(str(path)))
    elif isinstance(source, TextSource):
        for path in find_files(source.path):
            one = TextSource(kind="text", path=str(path), split=source.split)
            yield from _guarded(str(path), ((d.where, {"text": d.text}) for d in documents(one)))
    elif isinstance(source, HuggingFaceSource):
        yield from (Row(where, values) for where, values in rows(source))
    else:
        assert isinstance(source, StdlibSource)
        yield from (Row(d.where, {"text": d.text}) for d in documents(source))


def _jsonl(path: Path) -> Iterator[Row]:
    for n, raw in byte_lines(path):
        where = f"{path}:{n}"
        if not raw.strip():
            continue
        try:
            yield Row(where, parse_object(raw, where), raw=raw.rstrip(b"\r\n"))
        except UsageError as error:
            yield Row(where, None, problem=str(error))


def _guarded(place: str, read: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[Row]:
    try:
        for where, values in read:
            yield Row(where, values)
    except UsageError as error:
        yield Row(place, None, problem=str(error))


def reader_for(source: RawSource, first: Mapping[str, Any]) -> ColumnReader:
    """Reads the columns that the user named, or those that the first row suggests."""
    given = getattr(source, "columns", None) if "columns" in source.model_fields_set else None
    return ColumnReader(given or guess_columns(first, place_of(source)), place_of(source))


def guess_columns(row: Mapping[str, Any], place: str) -> Columns:
    """prompt + completion, text, input_ids (+ labels), or every column that holds text. Raises UsageError if none does."""
    if "prompt" in row and "completion" in row:
        return Columns(text="{prompt}\n{completion}")
    if "text" in row:
        return Columns(text="text")
    if "input_ids" in row:
        return Columns(input_ids="input_ids", labels="labels" if "labels" in row else None)
    named = [k for k, v in row.items() if isinstance(v, str) and not set(k) & set("{}.[]:!")]
    if not named:
        raise UsageError(f"{place}: no column holds text; there are: {', '.join(row) or 'none'}; say which with --text")
    return Columns(text="\n".join(f"{{{name}}}" for name in named))


def lacks_answer(values: Mapping[str, Any]) -> bool:
    """Is this a question-answer row with a blank side?"""
    return any(isinstance(values.get(name), str) and not values[name].strip() for name in ("prompt", "completion"))


def normalised(value: Any) -> Any:
    """NFC, line ends as \\n, no other control characters than tab and newline; inside lists and objects too."""
    if isinstance(value, str):
        text = unicodedata.normalize("NFC", value.replace("\r\n", "\n").replace("\r", "\n"))
        return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    if isinstance(value, list):
        return [normalised(v) for v in value]
    if isinstance(value, dict):
        return {k: normalised(v) for k, v in value.items()}
    return value
