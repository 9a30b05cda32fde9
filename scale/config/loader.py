"""Config from layers: defaults < YAML (with `extends:`) < `key.sub=value`; errors say file, line, key, value and fix."""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from scale.config.run import SCHEMA, PretrainRun
from scale.config.yamlfile import BadYaml, Path_, parse_value, read_yaml, write_yaml
from scale.errors import UsageError

Origins = dict[Path_, str]
"""Where each value came from: "configs/demo.yaml:12" or "command line"."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainRun:
    """Read, merge and validate a run config. Raises UsageError with one line per problem."""
    path = Path(path)
    content, origins = _read_layers(path, seen=())
    for override in overrides:
        _apply_override(content, origins, override)
    return validate(content, origins, path)


def validate(content: dict[str, Any], origins: Origins, path: Path) -> PretrainRun:
    """Turn merged content into a typed config, or raise UsageError."""
    try:
        return SCHEMA.validate_python(content)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for e in error.errors(include_url=False):
            place, message = _explain(e, content, origins, path)
            problems.setdefault(place, []).append(message)  # a union such as `auto` or a number has one per member
        lines = [f"{place}: {'; or '.join(dict.fromkeys(messages))}" for place, messages in problems.items()]
        raise UsageError("\n".join(lines)) from None


def to_yaml(config: BaseModel) -> str:
    """The resolved config, as written into the run folder."""
    return write_yaml(config.model_dump(mode="json"))


def differences(old: BaseModel, new: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    a, b = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def _flatten(value: Any, at: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, sub in value.items() for k, v in _flatten(sub, f"{at}.{key}" if at else key).items()}
    if isinstance(value, list) and value:
        return {k: v for i, sub in enumerate(value) for k, v in _flatten(sub, f"{at}.{i}").items()}
    return {at: value}


def _read_layers(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    if path.resolve() in seen:
        raise UsageError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    content, lines = read_yaml(path)
    origins: Origins = {at: f"{path}:{line}" for at, line in lines.items()}
    parent = content.pop("extends", None)
    if parent is None:
        return content, origins
    where = origins.get(("extends",), path)
    if not isinstance(parent, str):
        raise UsageError(f"{where}: extends = {_shown(parent)}: expected the path of one YAML file")
    if not os.path.isfile(path.parent / parent):  # noqa: PTH113  # unlike Path.is_file, False for every odd name
        raise UsageError(f"{where}: extends = {_shown(parent)}: no such file (a path relative to this file's folder)")
    base, base_origins = _read_layers(path.parent / parent, (*seen, path.resolve()))
    return _merge(base, content, base_origins, origins, ()), base_origins


def _merge(base: Any, top: Any, base_origins: Origins, top_origins: Origins, at: Path_) -> Any:
    """`top` over `base`: mappings merge, everything else replaces. A mapping of another `kind` replaces too."""
    if at in top_origins:
        base_origins[at] = top_origins[at]
    merge = isinstance(base, dict) and isinstance(top, dict) and not _other_kind(base, top)
    if not merge:
        for old in [k for k in base_origins if k[: len(at)] == at]:
            del base_origins[old]
        base_origins.update({k: v for k, v in top_origins.items() if k[: len(at)] == at})
        return top
    merged = dict(base)
    for key, value in top.items():
        merged[key] = _merge(base.get(key), value, base_origins, top_origins, (*at, key))
    return merged


def _other_kind(base: dict[str, Any], top: dict[str, Any]) -> bool:
    """Only where both say a kind: a base without one has left it open."""
    return "kind" in base and "kind" in top and base["kind"] != top["kind"]


def _apply_override(content: dict[str, Any], origins: Origins, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"command line: {override!r}: expected key.sub=value, for example optim.lr=3e-4")
    try:
        value = parse_value(text)
    except BadYaml as error:
        raise UsageError(f"command line: {key} = {_shown(text)}: {error}") from None
    at: Path_ = tuple(int(p) if re.fullmatch("[0-9]{1,9}", p) else p for p in key.split("."))
    here: Any = content
    for depth, part in enumerate(at):
        last = depth == len(at) - 1
        if isinstance(here, list):
            if not (isinstance(part, int) and part < len(here)):
                parent = ".".join(map(str, at[:depth]))
                raise UsageError(f"command line: {key}: {parent} has {len(here)} entries, counted from 0")
        elif not last and not isinstance(here.get(part), dict | list):
            here[part] = {}
        if last:
            here[part] = value
        elif isinstance(here[part], dict | list):
            here = here[part]
        else:
            shown = ".".join(map(str, at[: depth + 1]))
            raise UsageError(f"command line: {key}: {shown} = {_shown(here[part])} holds no keys")
    for old in [k for k in origins if k[: len(at)] == at]:
        del origins[old]
    origins[at] = "command line"


_PLAIN = {
    "missing": "is required",
    "model_type": "expected a mapping of keys",
    "model_attributes_type": "expected a mapping of keys",
    "dict_type": "expected a mapping of keys",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "string_type": "expected text (a number or true/false as text needs quotes)",
}


def _explain(error: Any, content: dict[str, Any], origins: Origins, path: Path) -> tuple[str, str]:
    """Where and which value, and what is wrong with it."""
    kind, message = error["type"], error["msg"]
    at = _real_path(error["loc"], kind, content)
    where = next((origins[at[:n]] for n in range(len(at), 0, -1) if at[:n] in origins), str(path))
    key = ".".join(str(part) if str(part).isprintable() else repr(part) for part in at)
    value, found = _lookup(content, at)
    shown = f" = {_shown(value)}" if found and at and not isinstance(value, dict | list) else ""
    if kind == "extra_forbidden":
        message = "unknown key" + _nearest(at, content)
    elif kind == "union_tag_not_found":
        message = f"needs `kind` (one of {_tags(at)})"
    elif kind == "union_tag_invalid":
        key, shown = f"{key}.kind", f" = {_shown(error['ctx']['tag'])}"
        tag, tags = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        message = f"unknown kind; expected one of {tags}{_close(tag, tags)}"
    elif kind == "literal_error":
        message = f"expected {error['ctx']['expected']}{_close(str(value), error['ctx']['expected'])}"
    else:
        message = _PLAIN.get(kind, message.removeprefix("Value error, ").removeprefix("Input "))
    return (f"{where}: {key}{shown}" if at else where), message


def _shown(value: Any) -> str:
    """A value as part of one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
    close = difflib.get_close_matches(value, names, n=1)
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
