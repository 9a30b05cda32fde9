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
    HuggingFaceSource,
    JsonlSource,
    ParquetSource,
    RawSource,
    StdlibSource,
    TextSource,
)
from scale.data.columns import ColumnReader, RawDocument
from scale.data.files import find_files, one_line, refuse_output_among
from scale.errors import UsageError

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
        return (_whole_file(path) for path in stdlib_files())
    if isinstance(source, TextSource):
        return _text_documents(source)
    reader = ColumnReader(source.columns, place_of(source))
    return (reader.read(row, where) for where, row in rows(source, reader))


def rows(
    source: JsonlSource | ParquetSource | HuggingFaceSource, reader: ColumnReader | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a source with columns: those that `reader` needs where a schema is known, or all."""
    if isinstance(source, JsonlSource):
        return jsonl_rows(source.path)
    if isinstance(source, ParquetSource):
        return parquet_rows(source.path, reader)
    return _hugging_face_rows(source, reader)


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
            yield _whole_file(path)
        elif source.split == "line":
            yield from (RawDocument(where, text=line) for where, line in text_lines(path) if line.strip())
        else:
            yield from _paragraphs(path)


def _whole_file(path: Path) -> RawDocument:
    return RawDocument(str(path), text="".join(_lines(path, keep_ends=True)))


def _lines(path: Path, keep_ends: bool) -> Iterator[str]:
    return (line if keep_ends else line.rstrip("\r\n") for _, line in _numbered(path))


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("path:line", line without its end) of a UTF-8 text file."""
    return ((f"{path}:{n}", line.rstrip("\r\n")) for n, line in _numbered(path))


def _paragraphs(path: Path) -> Iterator[RawDocument]:
    """Runs of lines between blank lines."""
    where, lines = "", list[str]()
    for here, line in text_lines(path):
        if line.strip():
            where = where if lines else here
            lines.append(line)
        elif lines:
            yield RawDocument(where, text="\n".join(lines))
            lines = []
    if lines:
        yield RawDocument(where, text="\n".join(lines))


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    for n, raw in byte_lines(path):
        yield n, decode(raw, f"{path}:{n}")


def byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line with its end); a byte order mark is skipped."""
    try:
        with path.open("rb") as file:
            for n, raw in enumerate(file, start=1):
                yield n, raw.removeprefix(b"\xef\xbb\xbf") if n == 1 else raw
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None


def decode(raw: bytes, where: str) -> str:
    """UTF-8 text without NUL bytes, or UsageError."""
    if b"\0" in raw:
        raise UsageError(f"{where}: binary data (a NUL byte at byte {raw.index(0)} of the line), expected UTF-8 text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start} of the line; convert the file to UTF-8"
        ) from None


def jsonl_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path:line", object) of every line that is not blank."""
    for file in find_files(path, ".jsonl"):
        for n, raw in byte_lines(file):
            if raw.strip():
                yield f"{file}:{n}", parse_object(raw, f"{file}:{n}")


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """One line of JSONL, or UsageError."""
    text = decode(raw, where).strip()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text) or error.msg.startswith("Unterminated")
        what = "the JSON object is cut off" if cut else f"not JSON: {error.msg} at column {error.colno}"
        raise UsageError(f"{where}: {what}: {text[:60]!r}") from None
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{where}: not readable JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: expected a JSON object {{...}}, found {text[:40]!r}")
    return value


def parquet_rows(path: str, reader: ColumnReader | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path: row N", row) with the columns that `reader` needs, or all; read batch by batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in find_files(path, ".parquet"):
        try:
            with pq.ParquetFile(file) as table:
                if reader is not None:
                    reader.check(table.schema_arrow.names, str(file))
                n = 0
                for batch in table.iter_batches(batch_size=1024, columns=reader.needed if reader else None):
                    for row in batch.to_pylist():
                        yield f"{file}: row {n}", row
                        n += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: not a readable Parquet file ({one_line(error)})") from None


def _hugging_face_rows(source: HuggingFaceSource, reader: ColumnReader | None) -> Iterator[tuple[str, dict[str, Any]]]:
    data = _load_hugging_face(source)
    if reader is not None and data.column_names is not None:
        reader.check(data.column_names, source.path)
        data = data.select_columns(reader.needed)
    try:
        for n, row in enumerate(islice(data, source.max_documents)):
            yield f"{source.path}: row {n}", row
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{source.path}: reading failed ({one_line(error)})") from None


def _load_hugging_face(source: HuggingFaceSource) -> Any:
    import datasets

    local = Path(source.path).expanduser()
    saved = any((local / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if not saved:
            name = str(local) if local.is_dir() else source.path
            return datasets.load_dataset(name, source.config, split=source.split, streaming=source.streaming)
        data = datasets.load_from_disk(str(local))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"{source.path}: cannot be loaded as a Hugging Face dataset ({one_line(error)})") from None
    if isinstance(data, datasets.DatasetDict):
        if source.split not in data:
            raise UsageError(f"{source.path}: no split {source.split!r}; there are: {', '.join(data)}")
        return data[source.split]
    return data


def describe(source: RawSource) -> dict[str, Any]:
    """What decides the content of a source: its options, and the names, sizes and times of its files."""
    options = source.model_dump(mode="json", exclude={"name", "weight"})
    files = _files_of(source)
    if not files:
        return options
    stats = [(str(p.resolve()), p.stat()) for p in files]
    state = json.dumps([(name, s.st_size, s.st_mtime_ns) for name, s in stats])
    return options | {
        "files": len(files),
        "bytes": sum(s.st_size for _, s in stats),
        "state": hashlib.sha256(state.encode()).hexdigest(),
    }


def _files_of(source: RawSource) -> list[Path]:
    if isinstance(source, StdlibSource):
        return stdlib_files()
    if isinstance(source, HuggingFaceSource):
        local = Path(source.path).expanduser()
        return find_files(source.path) if local.is_dir() else []
    return find_files(source.path, {"text": "", "jsonl": ".jsonl", "parquet": ".parquet"}[source.kind])
