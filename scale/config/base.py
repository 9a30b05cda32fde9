"""Shared pieces of the config schema. This package imports no torch: configs load in milliseconds anywhere."""

from __future__ import annotations

import fractions
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

LARGEST = 10**18
"""No count of tokens, steps or rows comes near it, and numbers below it fit wherever they are handed on to."""
_SUFFIX = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


class Strict(BaseModel):
    """Unknown keys are errors, values never change after loading, and every field's docstring is its documentation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def _true_is_no_number(value: Any) -> Any:
    """Python takes true for 1."""
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


NUMBER = BeforeValidator(_true_is_no_number)
"""Of every field that holds a number and is no `Count`."""


def _parse_count(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a whole number, not true or false")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kKmMbBtT]?)\s*", value)
        if match is None:
            raise ValueError("expected a whole number such as 65536, 64k, 1.5M or 300B")
        number = fractions.Fraction(match[1].replace("_", "")) * _SUFFIX.get(match[2].lower(), 1)
        if number.denominator != 1:
            raise ValueError("is not a whole number")
        value = int(number)
    if isinstance(value, int) and value > LARGEST:
        raise ValueError("is beyond every sensible count (at most 10^18)")
    return value


Count = Annotated[int, BeforeValidator(_parse_count), Field(gt=0)]
"""A positive whole number; 64k, 1.5M, 300B are understood (decimal: 64k = 64,000)."""
Fraction = Annotated[float, NUMBER, Field(ge=0, le=1)]
Positive = Annotated[float, NUMBER, Field(gt=0)]
NonNegative = Annotated[float, NUMBER, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A file name: letters, digits, dot, dash, underscore."""
NAME_IN_WORDS = "expected 1 to 100 letters, digits, dots, dashes or underscores, a letter or digit first"
"""What the pattern of `Name` says."""


def exactly_one(model: BaseModel, *names: str) -> None:
    """Raise ValueError unless exactly one of the named fields is set."""
    given = [n for n in names if getattr(model, n) is not None]
    if len(given) != 1:
        hint = f"; {given[0]}=null unsets one" if given else ""
        shown = ", ".join(given) if given else "none"
        raise ValueError(f"give exactly one of {', '.join(names)} (given: {shown}{hint})")


def is_count(metadata: Iterable[Any]) -> bool:
    """Whether a field with this metadata is a Count."""
    return any(isinstance(m, BeforeValidator) and m.func is _parse_count for m in metadata)
