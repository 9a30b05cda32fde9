"""Config from layers: defaults < YAML (with `extends:`) < `key.sub=value`; errors say file, line, key, value and fix."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from scale.config.explain import Origins, explain, shown
from scale.config.renamed import in_todays_words
from scale.config.run import SCHEMA, PretrainRun
from scale.config.yamlfile import BadYaml, Path_, parse_value, parse_yaml, read_yaml, write_yaml
from scale.errors import UsageError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainRun:
    """Read, merge and validate a run config. Raises UsageError with one line per problem."""
    path = Path(path)
    content, origins = _read_layers(path, seen=())
    for override in overrides:
        _apply_override(content, origins, override)
    return validate(content, origins, path)


def stored_config(path: Path) -> PretrainRun:
    """The resolved config of a run folder, also one that an earlier version wrote. Raises UsageError."""
    content, origins = _read_layers(path, seen=())
    return validate(in_todays_words(content), origins, path)


def parse_config(text: str, path: Path) -> PretrainRun:
    """A resolved config (`to_yaml`) back from its text, which came from `path`, in the words of this version. Raises
    UsageError."""
    content, lines = parse_yaml(text, path)
    return validate(in_todays_words(content), {at: f"{path}:{line}" for at, line in lines.items()}, path)


def validate(content: dict[str, Any], origins: Origins, path: Path) -> PretrainRun:
    """Turn merged content into a typed config, or raise UsageError."""
    try:
        return SCHEMA.validate_python(content)
    except ValidationError as error:
        raise UsageError(explain(error, content, origins, path)) from None


def to_yaml(config: BaseModel) -> str:
    """The resolved config, as written into the run folder."""
    return write_yaml(config.model_dump(mode="json"))


def differences(old: BaseModel, new: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    a, b = flatten(old), flatten(new)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def flatten(config: BaseModel) -> dict[str, Any]:
    """Every value of a config by its dotted key."""
    return _flatten(config.model_dump(mode="json"))


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
        raise UsageError(f"{where}: extends = {shown(parent)}: expected the path of one YAML file")
    if not os.path.isfile(path.parent / parent):  # noqa: PTH113  # unlike Path.is_file, False for every odd name
        raise UsageError(f"{where}: extends = {shown(parent)}: no such file (a path relative to this file's folder)")
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
    if key == "extends":
        raise UsageError(f"command line: {override!r}: `extends` works in files only (give that file and overrides)")
    try:
        value = parse_value(text)
    except BadYaml as error:
        raise UsageError(f"command line: {key} = {shown(text)}: {error}") from None
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
            place = ".".join(map(str, at[: depth + 1]))
            raise UsageError(f"command line: {key}: {place} = {shown(here[part])} holds no keys")
    for old in [k for k in origins if k[: len(at)] == at]:
        del origins[old]
    origins[at] = "command line"
