"""What the data tools read: a SOURCE argument as a config, and its rows one by one, broken ones included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from scale.config.data import (
    Columns,
    CsvSource,
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
from scale.data.compressed import ending
from scale.data.delimited import CsvFile
from scale.data.documents import MANIFEST
from scale.data.files import find_files
from scale.data.jsonl import object_lines, parse_object
from scale.data.parquet import parquet_rows
from scale.data.sources import documents, files_of, place_of, rows
from scale.errors import UsageError

_KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".txt", ".md", ".py"), "text"),
    ".parquet": "parquet",
    ".npy": "packed",
}
_SOURCE: TypeAdapter[Source] = TypeAdapter(Source)


@dataclass
class Row:
    """One row: its values, or why it cannot be read. `raw` is the line of a JSONL file. `last`: nor can what follows in
    its file."""

    where: str
    values: dict[str, Any] | None
    problem: str | None = None
    raw: bytes | None = None
    last: bool = False


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
    endings = {ending(p) for p in find_files(path)}
    kinds = {_KINDS.get(name) for name in endings}
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
    """Every row. A broken line of JSONL or CSV is one row with a problem; any other broken file ends there with one."""
    if isinstance(source, HuggingFaceSource):
        yield from (Row(where, values) for where, values in rows(source))
    elif isinstance(source, StdlibSource):
        yield from (Row(d.where, {"text": d.text}) for d in documents(source))
    else:
        for path in files_of(source):
            yield from _guarded(str(path), _rows_of(path, source))


def _rows_of(path: Path, source: TextSource | JsonlSource | CsvSource | ParquetSource) -> Iterator[Row]:
    if isinstance(source, JsonlSource):
        for where, raw in object_lines(path):
            yield _row(where, partial(parse_object, raw, where), raw.rstrip(b"\r\n"))
    elif isinstance(source, CsvSource):
        table = CsvFile(path, source.delimiter)
        for where, fields in table.records():
            yield _row(where, partial(table.row, fields, where))
    elif isinstance(source, ParquetSource):
        yield from (Row(where, values) for where, values in parquet_rows(path))
    else:
        one = source.model_copy(update={"path": str(path)})
        yield from (Row(d.where, {"text": d.text}) for d in documents(one))


def _row(where: str, read: Callable[[], dict[str, Any]], raw: bytes | None = None) -> Row:
    try:
        return Row(where, read(), raw=raw)
    except UsageError as error:
        return Row(where, None, problem=str(error))


def _guarded(place: str, every: Iterator[Row]) -> Iterator[Row]:
    """The rows of a file; where it cannot be read on, a last one that says so."""
    try:
        yield from every
    except UsageError as error:
        yield Row(place, None, problem=str(error), last=True)


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
