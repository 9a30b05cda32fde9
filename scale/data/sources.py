"""Raw documents of every kind of source, one after the other, in a fixed order."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from scale.config.data import (
    CsvSource,
    FileSource,
    HuggingFaceSource,
    JsonlSource,
    ParquetSource,
    RawSource,
    StdlibSource,
    TextSource,
)
from scale.data import delimited, jsonl, parquet
from scale.data.columns import ColumnReader, RawDocument
from scale.data.delimited import CsvFile
from scale.data.files import Found, find_files, look_for, one_line, refuse_output_among
from scale.data.jsonl import object_lines, parse_object
from scale.data.lines import paragraphs, text_lines, whole_file
from scale.data.parquet import parquet_rows
from scale.errors import UsageError
from scale.hub import need

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def place_of(source: RawSource) -> str:
    """How errors call a source."""
    return source.kind if isinstance(source, StdlibSource) else source.path


def refuse_as_output(source: RawSource, *outputs: str | Path) -> None:
    """Raises UsageError where writing an output would change what `source` reads, before anything is touched."""
    if isinstance(source, StdlibSource):
        return refuse_output_among(sysconfig.get_path("stdlib"), *outputs)
    if not isinstance(source, HuggingFaceSource) or Path(source.path).expanduser().exists():
        refuse_output_among(source.path, *outputs)


def documents(source: RawSource) -> Iterator[RawDocument]:
    """Every document of a raw source. Raises UsageError (file, line, value) for missing, broken or wrongly typed data."""
    empty = True
    for document in _documents(source):
        empty = False
        yield document
    if empty:
        raise UsageError(f"{place_of(source)}: holds no documents (the data is empty)")


def _documents(source: RawSource) -> Iterator[RawDocument]:
    if isinstance(source, StdlibSource):
        return (whole_file(path) for path in stdlib_files())
    if isinstance(source, TextSource):
        return _text_documents(source)
    reader = ColumnReader(source.columns, place_of(source))
    return (reader.read(row, where) for where, row in rows(source, reader))


def rows(
    source: JsonlSource | CsvSource | ParquetSource | HuggingFaceSource, reader: ColumnReader | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a source with columns: those that `reader` needs where a schema is known, or all."""
    if isinstance(source, HuggingFaceSource):
        yield from _hugging_face_rows(source, reader)
        return
    for path in files_of(source):
        if isinstance(source, JsonlSource):
            yield from _jsonl_rows(path)
        elif isinstance(source, CsvSource):
            yield from _csv_rows(path, source.delimiter, reader)
        else:
            yield from parquet_rows(path, reader)


def stdlib_files() -> list[Path]:
    """The .py files of the running interpreter's standard library, sorted, without tests and third-party packages."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [p for p in root.rglob("*.py") if not _NOT_LIBRARY.intersection(p.relative_to(root).parts)]
    if not found:
        raise UsageError(f"python-stdlib: this interpreter ({sys.executable}) has no .py files in {root}")
    return sorted(found)


def _text_documents(source: TextSource) -> Iterator[RawDocument]:
    for path in find_files(source.path):
        if source.split == "file":
            yield whole_file(path)
        elif source.split == "line":
            yield from (RawDocument(where, text=line) for where, line in text_lines(path) if line.strip())
        else:
            yield from paragraphs(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((where, parse_object(raw, where)) for where, raw in object_lines(path))


def _csv_rows(path: Path, delimiter: str | None, reader: ColumnReader | None) -> Iterator[tuple[str, dict[str, Any]]]:
    table = CsvFile(path, delimiter)
    if reader is not None and table.header:
        reader.check(table.header, str(path))
    for where, fields in table.records():
        yield where, table.row(fields, where)


def _hugging_face_rows(source: HuggingFaceSource, reader: ColumnReader | None) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets.exceptions import DatasetsError

    data = _load_hugging_face(source)
    if reader is not None and data.column_names is not None:
        reader.check(data.column_names, source.path)
        data = data.select_columns(reader.needed)
    try:
        for n, row in enumerate(islice(data, source.max_documents)):
            yield f"{source.path}: row {n}", row
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UsageError(f"{source.path}: reading failed ({one_line(error.__cause__ or error)})") from None


def _load_hugging_face(source: HuggingFaceSource) -> Any:
    import datasets

    local = Path(source.path).expanduser()
    saved = any((local / name).is_file() for name in ("state.json", "dataset_dict.json"))
    need({}, [source.path])
    try:
        if not saved:
            name = str(local) if local.is_dir() else source.path
            return datasets.load_dataset(name, source.config, split=source.split, streaming=source.streaming)
        data = datasets.load_from_disk(str(local))
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error.__cause__ or error)
        raise UsageError(f"{source.path}: cannot be loaded as a Hugging Face dataset ({reason})") from None
    if isinstance(data, datasets.DatasetDict):
        if source.split not in data:
            raise UsageError(f"{source.path}: no split {source.split!r}; there are: {', '.join(data)}")
        return data[source.split]
    return data


def describe(source: RawSource) -> dict[str, Any]:
    """What decides the content of a source: its options, and the names, sizes and times of its files."""
    options = source.model_dump(mode="json", exclude={"name", "weight"})
    files = files_of(source)
    if not files:
        return options
    stats = [(str(p.resolve()), p.stat()) for p in files]
    state = json.dumps([(name, s.st_size, s.st_mtime_ns) for name, s in stats])
    return options | {
        "files": len(files),
        "bytes": sum(s.st_size for _, s in stats),
        "state": hashlib.sha256(state.encode()).hexdigest(),
    }


ENDINGS: dict[str, tuple[str, ...]] = {"jsonl": jsonl.ENDINGS, "csv": delimited.ENDINGS, "parquet": parquet.ENDINGS}
"""What is read of a folder; of text, everything."""


def files_of(source: RawSource) -> list[Path]:
    """The files that a source reads, sorted; none for a dataset of the hub."""
    return stdlib_files() if isinstance(source, StdlibSource) else _found(source).files


def left_out(source: RawSource) -> dict[str, int]:
    """How many files there are of each kind that a folder or glob holds and the source does not read."""
    return {} if isinstance(source, StdlibSource) else dict(_found(source).left_out)


def _found(source: FileSource | HuggingFaceSource) -> Found:
    if isinstance(source, HuggingFaceSource):
        local = Path(source.path).expanduser()
        return Found(find_files(source.path)) if local.is_dir() else Found()
    return look_for(source.path, *ENDINGS.get(source.kind, ()))
