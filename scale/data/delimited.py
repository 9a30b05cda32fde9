"""Rows of CSV and TSV files with a header."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from scale.data.compressed import ending
from scale.data.lines import byte_lines, decode, head
from scale.data.recognise import markup
from scale.errors import UsageError

ENDINGS = (".csv", ".tsv")
_LONGEST_FIELD = 2**31 - 1


class CsvFile:
    """One file: `header`, then `records`. Quotes as RFC 4180 has them; a field may hold line ends.

    Raises UsageError (file, line) for a header that names a column twice, broken quotes, text that is not UTF-8.
    """

    def __init__(self, path: Path, delimiter: str | None = None):
        if (page := markup(head(path))) is not None:
            raise UsageError(f"{path}: is {page}, expected rows")
        csv.field_size_limit(_LONGEST_FIELD)  # the default of 128 KiB is less than many documents
        lines = (decode(raw, f"{path}:{n}") for n, raw in byte_lines(path))
        self.path, self._separator = path, delimiter or ("\t" if ending(path) == ".tsv" else ",")
        self._table = csv.reader(lines, delimiter=self._separator, strict=True)
        _, self.header = self._next() or ("", [])
        for name, times in Counter(self.header).items():
            if times > 1:
                raise UsageError(f"{path}:1: the header names column {name!r} {times} times")

    def records(self) -> Iterator[tuple[str, list[str]]]:
        """("path:line", fields) of every record that is not blank."""
        while (record := self._next()) is not None:
            if record[1]:
                yield record

    def row(self, fields: Sequence[str], where: str) -> dict[str, str]:
        """Fields by the names of the header, all of them text. Raises UsageError unless there are equally many."""
        if len(fields) != len(self.header):
            raise UsageError(
                f"{where}: {len(fields)} fields, but the header has {len(self.header)} (an unquoted {self._separator!r}, or "
                "another delimiter?)"
            )
        return dict(zip(self.header, fields, strict=True))

    def _next(self) -> tuple[str, list[str]] | None:
        where = f"{self.path}:{self._table.line_num + 1}"
        try:
            fields = next(self._table, None)
        except csv.Error as error:
            what = "lines end with \\r alone" if "new-line character" in str(error) else error
            raise UsageError(f"{where}: not valid CSV ({what})") from None
        return None if fields is None else (where, fields)
