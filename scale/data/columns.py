"""From a row of named columns to a document: text (or a template), or token ids with their labels."""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scale.config.data import Columns
from scale.errors import UsageError

IGNORED = -100
"""The label of a token that is not learned (Hugging Face convention)."""


@dataclass(slots=True)
class RawDocument:
    """One document before tokenising: `text`, or `ids` (n,) int64 with `learned` (n,) bool or None. `where` is for errors."""

    where: str
    text: str | None = None
    ids: np.ndarray | None = None
    learned: np.ndarray | None = None

    def content(self) -> bytes:
        """What makes two documents equal when it comes to choosing a side: the text, or the ids without their labels."""
        if self.text is not None:
            return self.text.encode()
        assert self.ids is not None
        return self.ids.tobytes()


class ColumnReader:
    """Reads documents from rows as `Columns` says. Raises UsageError naming the place, the column and the columns there."""

    def __init__(self, columns: Columns, place: str):
        self.columns = columns
        template = columns.text if columns.text is not None and "{" in columns.text else None
        self._parts = _parse_template(template, place) if template is not None else None

    @property
    def needed(self) -> list[str]:
        """Names of the columns that are read."""
        if self._parts is not None:
            return list(dict.fromkeys(name for _, name in self._parts if name is not None))
        return [c for c in (self.columns.text, self.columns.input_ids, self.columns.labels) if c is not None]

    def check(self, present: Iterable[str], place: str) -> None:
        """All needed columns are there, or UsageError with the nearest name."""
        names = list(present)
        for name in self.needed:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UsageError(
                    f"{place}: no column {name!r}; there are: {', '.join(map(str, names)) or 'none'}{hint}"
                )

    def read(self, row: Mapping[str, Any], where: str) -> RawDocument:
        """One row as a document."""
        self.check(row.keys(), where)
        if self._parts is not None:
            text = "".join(
                lead + ("" if name is None else _shown(row[name], name, where)) for lead, name in self._parts
            )
            return RawDocument(where, text=_sound(text, where))
        if self.columns.text is not None:
            return RawDocument(where, text=_text(row[self.columns.text], self.columns.text, where))
        assert self.columns.input_ids is not None
        ids = _integers(row[self.columns.input_ids], self.columns.input_ids, where)
        negative = np.flatnonzero(ids < 0)
        if len(negative):
            first = int(negative[0])
            raise UsageError(f"{where}: {self.columns.input_ids}[{first}] = {ids[first]}: token ids are never negative")
        if self.columns.labels is None:
            return RawDocument(where, ids=ids)
        return RawDocument(where, ids=ids, learned=self._learned(ids, row[self.columns.labels], where))

    def _learned(self, ids: np.ndarray, labels: Any, where: str) -> np.ndarray:
        name, of = self.columns.labels, self.columns.input_ids
        values = _integers(labels, str(name), where)
        if len(values) != len(ids):
            raise UsageError(
                f"{where}: {name} has {len(values)} entries and {of} {len(ids)}; they must be equally long"
            )
        learned = values != IGNORED
        wrong = np.flatnonzero(learned & (values != ids))
        if len(wrong):
            i = int(wrong[0])
            raise UsageError(
                f"{where}: {name}[{i}] = {values[i]}, but {of}[{i}] = {ids[i]}; labels repeat the ids (unshifted) or are -100"
            )
        return learned


def _parse_template(template: str, place: str) -> list[tuple[str, str | None]]:
    """(literal text, column after it or None) pairs. Only plain names: no attributes, indices, formats."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"{place}: columns.text = {template!r}: {error}; write {{{{ for a literal brace") from None
    for _, name, form, conversion in parsed:
        if name is not None and (not name or form or conversion or set(name) & set(".[]")):
            raise UsageError(f"{place}: columns.text = {template!r}: between braces only the plain name of a column")
    if not any(name for _, name, _, _ in parsed):
        raise UsageError(f"{place}: columns.text = {template!r}: names no column; write {{column}}")
    return [(lead, name) for lead, name, _, _ in parsed]


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where}: column {name!r} holds {_kind(value)}, expected text")
    return _sound(value, where)


def _shown(value: Any, name: str, where: str) -> str:
    """A template may show numbers too."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return _text(value, name, where)


def _sound(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = f"\\u{ord(text[error.start]):04x}"
        raise UsageError(
            f"{where}: text holds {broken}, half of a surrogate pair, at character {error.start}"
        ) from None
    return text


def _integers(value: Any, name: str, where: str) -> np.ndarray:
    if not isinstance(value, list | tuple | np.ndarray):
        raise UsageError(f"{where}: column {name!r} holds {_kind(value)}, expected a list of whole numbers")
    if len(value) == 0:
        return np.zeros(0, dtype=np.int64)
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths inside
        array = np.asarray(value, dtype=object)
    if array.dtype.kind == "i" and array.ndim == 1:
        return array.astype(np.int64)
    wrong = next((v for v in value if isinstance(v, bool) or not isinstance(v, int | np.integer)), value[0])
    raise UsageError(f"{where}: column {name!r} holds {_kind(wrong)} in its list, expected whole numbers below 2^63")


def _kind(value: Any) -> str:
    """A value as a reader of JSON would call it."""
    if value is None:
        return "null"
    names = {bool: "true/false", int: "a number", float: "a fraction", str: "text", list: "a list", dict: "an object"}
    return f"{names.get(type(value), type(value).__name__)} ({str(value)[:30]!r})"
