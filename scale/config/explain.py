"""What pydantic says about a config, in the user's words: file, line, key, value, what is wrong, what was meant."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from scale.config.base import NAME_IN_WORDS
from scale.config.renamed import what_became_of, what_became_of_value
from scale.config.run import PretrainRun
from scale.config.yamlfile import Path_

Origins = dict[Path_, str]
"""Where each value came from: "configs/demo.yaml:12" or "command line"."""


def explain(error: ValidationError, content: dict[str, Any], origins: Origins, path: Path) -> str:
    """One line per problem of a config read from `path`."""
    problems: dict[str, list[str]] = {}
    found = error.errors(include_url=False)
    if not content:
        return f"{path}: is empty (a run needs {_listed([str(problem['loc'][-1]) for problem in found])})"
    for problem in _missing_together(found):
        if problem["type"] == "too_short" and any(_inside(other["loc"], problem["loc"]) for other in found):
            continue  # pydantic does not count entries that are wrong themselves
        place, message = _explain(problem, content, origins, path)
        problems.setdefault(place, []).append(message)  # a union such as `auto` or a number has one per member
    return "\n".join(f"{place}: {'; or '.join(dict.fromkeys(messages))}" for place, messages in problems.items())


def _missing_together(found: Sequence[Any]) -> list[Any]:
    """One problem for all keys that one mapping lacks: `loc` is that of the first, `keys` names all."""
    out: list[Any] = []
    first: dict[tuple[Any, ...], Any] = {}
    for problem in found:
        if problem["type"] != "missing" or isinstance(problem["loc"][-1], int):
            out.append(problem)
        elif problem["loc"][:-1] in first:
            first[problem["loc"][:-1]]["keys"].append(str(problem["loc"][-1]))
        else:
            first[problem["loc"][:-1]] = dict(problem) | {"keys": [str(problem["loc"][-1])]}
            out.append(first[problem["loc"][:-1]])
    return out


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _inside(loc: tuple[Any, ...], outer: tuple[Any, ...]) -> bool:
    return len(loc) > len(outer) and loc[: len(outer)] == outer


def shown(value: Any) -> str:
    """A value as part of one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_PLAIN = {
    "missing": "is required",
    "model_type": "expected a mapping of keys",
    "model_attributes_type": "expected a mapping of keys",
    "dict_type": "expected a mapping of keys",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "string_type": "expected text (a number or true/false as text needs quotes)",
    "int_parsing": "expected a whole number",
    "int_parsing_size": "expected a whole number of fewer digits",
    "int_from_float": "expected a whole number",
    "int_type": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "invalid_key": "a key must be a word",
    "string_pattern_mismatch": NAME_IN_WORDS,  # names are the only texts with a pattern
}


def _explain(error: Any, content: dict[str, Any], origins: Origins, path: Path) -> tuple[str, str]:
    """Where and which value, and what is wrong with it."""
    kind, message = error["type"], error["msg"]
    at = _real_path(error["loc"], kind, content)
    above = (origins[at[:n]] for n in range(len(at), 0, -1) if at[:n] in origins)
    below = (place for known, place in origins.items() if at and known[: len(at)] == at)
    where = next(above, next(below, str(path)))
    key = ".".join(str(part) if str(part).isprintable() else repr(part) for part in at)
    value, found = _lookup(content, at)
    value_shown = f" = {shown(value)}" if found and at and (value == [] or not isinstance(value, dict | list)) else ""
    if kind == "missing" and len(error.get("keys", [])) > 1:
        key, message = ".".join(key.split(".")[:-1]), f"{_listed(error['keys'])} are required"
        return (f"{where}: {key}" if key else where), message
    if kind == "invalid_key":
        key, value_shown = str(error["loc"][0 if len(error["loc"]) < 2 else -2]), ""
    if kind == "extra_forbidden":
        message = what_became_of(key) or "unknown key" + _nearest(at, content)
    elif kind == "union_tag_not_found":
        message = f"needs `kind` (one of {_tags(at)})"
    elif kind == "union_tag_invalid":
        key, value_shown = f"{key}.kind", f" = {shown(error['ctx']['tag'])}"
        tag, tags = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        message = f"unknown kind; expected one of {tags}{_close(tag, tags)}"
    elif kind == "literal_error" and (became := what_became_of_value(key, value)):
        message = became
    elif kind == "literal_error":
        message = f"expected {error['ctx']['expected']}{_close(str(value), error['ctx']['expected'])}"
    elif kind in ("too_short", "too_long") and isinstance(value, list):
        limit = "{min_length} or more" if kind == "too_short" else "{max_length} or fewer"
        message = f"needs {limit.format(**error['ctx'])} entries, has {len(value)}"
    else:
        message = _PLAIN.get(kind, message.removeprefix("Value error, ").removeprefix("Input "))
    return (f"{where}: {key}{value_shown}" if at else where), message


def _real_path(loc: tuple[Any, ...], kind: str, content: Any) -> Path_:
    """Pydantic's location without the names of union members, which are not keys in the file."""
    at: list[str | int] = []
    here, tagged = content, False
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        names_a_key = last and kind in ("missing", "extra_forbidden")
        if (
            isinstance(here, dict)
            and not names_a_key
            and (part not in here or (here.get("kind") == part and not tagged))
        ):
            tagged = True  # the member of a union: of mappings by its kind, of scalars such as "int"
            continue
        if not isinstance(here, dict | list) or (isinstance(here, list) and not isinstance(part, int)):
            break  # the member of a union of scalars
        at.append(part)
        here, tagged = _lookup(here, (part,))[0], False
    return tuple(at)


def _lookup(content: Any, at: Path_) -> tuple[Any, bool]:
    for part in at:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return None, False
    return content, True


def _nearest(at: Path_, content: dict[str, Any]) -> str:
    """Suggest a sibling key, or the same key where it does exist elsewhere in the schema."""
    wrong = str(at[-1])
    siblings = list(_fields(PretrainRun, at[:-1], content))
    close = difflib.get_close_matches(wrong, siblings, n=1)
    if close:
        return f"; did you mean {'.'.join(map(str, (*at[:-1], close[0])))}?"
    elsewhere = [p for p in _all_paths(PretrainRun) if p.split(".")[-1] == wrong]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f" (known here: {', '.join(siblings)})"


def _close(value: str, expected: str) -> str:
    names = [part.strip().strip("'") for part in expected.replace(" or ", ",").split(",")]
    close = ["cuda"] if value == "gpu" and "cuda" in names else difflib.get_close_matches(value, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Config classes inside an annotation such as list[A | B] or Annotated[...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list, tuple):
        return [m for arg in get_args(annotation) for m in _models(arg)]
    return []


def _fields(model: type[BaseModel], at: Path_, content: Any) -> dict[str, Any]:
    candidates = [model]
    for part in at:
        content = _lookup(content, (part,))[0]
        if isinstance(part, int):
            continue
        candidates = [m for c in candidates if part in c.model_fields for m in _models(c.model_fields[part].annotation)]
    kind = content.get("kind") if isinstance(content, dict) else None
    tagged = [c for c in candidates if "kind" in c.model_fields and kind in get_args(c.model_fields["kind"].annotation)]
    return {name: f for c in (tagged or candidates) for name, f in c.model_fields.items()}


def _tags(at: Path_) -> str:
    candidates: list[type[BaseModel]] = [PretrainRun]
    for part in at:
        if not isinstance(part, int):
            candidates = [
                m for c in candidates if part in c.model_fields for m in _models(c.model_fields[part].annotation)
            ]
    return ", ".join(
        str(get_args(c.model_fields["kind"].annotation)[0]) for c in candidates if "kind" in c.model_fields
    )


def _all_paths(model: type[BaseModel], at: str = "") -> list[str]:
    out = []
    for name, item in model.model_fields.items():
        here = f"{at}.{name}" if at else name
        out.append(here)
        out += [p for m in _models(item.annotation) for p in _all_paths(m, here)]
    return out
