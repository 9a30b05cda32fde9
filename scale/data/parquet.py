"""Rows of Parquet files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale.data.columns import ColumnReader
from scale.data.files import one_line
from scale.data.recognise import foreign
from scale.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = (".parquet",)


def parquet_rows(path: Path, reader: ColumnReader | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path: row N", row) with the columns that `reader` needs, or all; read batch by batch.

    Raises UsageError for what is no Parquet file, and for a column, or a field inside one, that is there twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            _refuse_twice(table.schema_arrow, str(path), "")
            if reader is not None:
                reader.check(table.schema_arrow.names, str(path))
            n = 0
            for batch in table.iter_batches(batch_size=1024, columns=reader.needed if reader else None):
                for row in batch.to_pylist():
                    yield f"{path}: row {n}", row
                    n += 1
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UsageError(f"{path}: not a readable Parquet file ({_found(path) or one_line(error)})") from None


def _refuse_twice(fields: pa.Schema | pa.StructType, place: str, at: str) -> None:
    import pyarrow as pa

    every = [fields.field(i) for i in range(len(fields.names))]
    for name, times in Counter(fields.names).items():
        if times > 1:
            raise UsageError(f"{place}: column {at + name!r} is there {times} times; rename or drop all but one")
    for field in every:
        inner = field.type
        while pa.types.is_list(inner) or pa.types.is_large_list(inner) or pa.types.is_fixed_size_list(inner):
            inner = inner.value_type
        if pa.types.is_struct(inner):
            _refuse_twice(inner, place, f"{at}{field.name}.")


def _found(path: Path) -> str | None:
    """What lies there in its place."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return None
    if not start:
        return "it is empty"
    if start.startswith(b"PAR1"):
        return None
    return f"it is {foreign(start) or 'another kind of file'}"
