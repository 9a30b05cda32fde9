"""Config from layers: defaults < YAML (with `extends:`) < `key.sub=value`; errors say file, line, key, value and fix."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from scale.config.run import SCHEMA, PretrainRun
from scale.config.yamlfile import Path_, parse_value, read_yaml
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
        lines = [_explain(e, content, origins, path) for e in error.errors(include_url=False)]
        raise UsageError("\n".join(dict.fromkeys(lines))) from None


def to_yaml(config: BaseModel) -> str:
    """The resolved config, as written into the run folder."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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
    if not isinstance(parent, str):
        raise UsageError(f"{origins[('extends',)]}: extends = {parent!r}: expected the path of one YAML file")
    base, base_origins = _read_layers(path.parent / parent, (*seen, path.resolve()))
    return _merge(base, content, base_origins, origins, ()), base_origins


def _merge(base: Any, top: Any, base_origins: Origins, top_origins: Origins, at: Path_) -> Any:
    """`top` over `base`: mappings merge, everything else replaces. A mapping of another `kind` replaces too."""
    if at in top_origins:
        base_origins[at] = top_origins[at]
    same_kind = (
        isinstance(base, dict) and isinstance(top, dict) and base.get("kind") == top.get("kind", base.get("kind"))
    )
    if not same_kind:
        base_origins.update({k: v for k, v in top_origins.items() if k[: len(at)] == at})
        return top
    merged = dict(base)
    for key, value in top.items():
        merged[key] = _merge(base.get(key), value, base_origins, top_origins, (*at, key))
    return merged


def _apply_override(content: dict[str, Any], origins: Origins, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"command line: {override!r}: expected key.sub=value, for example optim.lr=3e-4")
    try:
        value = parse_value(text)
    except yaml.YAMLError:
        raise UsageError(f"command line: {key} = {text!r}: not a YAML value") from None
    at: Path_ = tuple(int(p) if p.isdigit() else p for p in key.split("."))
    here: Any = content
    for depth, part in enumerate(at[:-1]):
        if isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif isinstance(here, dict):
            if not isinstance(here.get(part), dict | list):
                here[part] = {}
            here = here[part]
        else:
            raise UsageError(f"command line: {key}: {'.'.join(map(str, at[: depth + 1]))} does not exist")
    last = at[-1]
    if isinstance(here, list) and not (isinstance(last, int) and last < len(here)):
        raise UsageError(f"command line: {key}: the list has {len(here)} entries, counted from 0")
    here[last] = value
    for old in [k for k in origins if k[: len(at)] == at]:
        del origins[old]
    origins[at] = "command line"


def _explain(error: Any, content: dict[str, Any], origins: Origins, path: Path) -> str:
    at = _real_path(error["loc"], content)
    where = next((origins[at[:n]] for n in range(len(at), 0, -1) if at[:n] in origins), str(path))
    key = ".".join(map(str, at)) or "(root)"
    value, found = _lookup(content, at)
    shown = f" = {value!r}" if found and at and not isinstance(value, dict | list) else ""
    kind, message = error["type"], error["msg"]
    if kind == "extra_forbidden":
        message = "unknown key" + _nearest(at, content)
    elif kind == "missing":
        message = "is required"
    elif kind == "union_tag_not_found":
        message = f"needs `kind` (one of {error['ctx']['discriminator'] and _tags(at)})"
    elif kind == "union_tag_invalid":
        key, shown = f"{key}.kind", f" = {error['ctx']['tag']!r}"
        message = f"unknown kind; expected one of {error['ctx']['expected_tags']}"
    elif kind == "literal_error":
        message = f"expected {error['ctx']['expected']}{_close(str(value), error['ctx']['expected'])}"
    else:
        message = message.removeprefix("Value error, ").removeprefix("Input ")
    return f"{where}: {key}{shown}: {message}" if at else f"{where}: {message}"


def _real_path(loc: tuple[Any, ...], content: Any) -> Path_:
    """Pydantic's location without the names of union members, which are not keys in the file."""
    at: list[str | int] = []
    here = content
    for i, part in enumerate(loc):
        if isinstance(here, dict) and part not in here and i < len(loc) - 1:
            continue  # the tag of a union member
        if not isinstance(here, dict | list):
            break  # the branch of a union of scalars, such as "int"
        at.append(part)
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            here = None
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
