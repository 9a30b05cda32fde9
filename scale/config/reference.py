"""docs/configuration.md from the schema: `python -m scale.config.reference > docs/configuration.md`."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from scale.config.base import Strict, is_count
from scale.config.run import RunConfig

INTRODUCTION = """\
# Configuration

One YAML file describes one run. This is every option it may hold; the page is made from the schema
(`python -m scale.config.reference > docs/configuration.md`), so it is complete.

```yaml
extends: base.yaml        # optional: another file that this one is laid over, relative to this one
version: 1
kind: pretrain
name: first
model: {preset: tiny}
data:
  sources: [{kind: python-stdlib}]
  tokenizer: {vocab_size: 4096}
  seq_len: 256
batch: {tokens: 8192}
train: {steps: 200}
optim: {lr: 3e-4}
```

A value comes from the last of these layers that gives it: the default, the file named by `extends`, the file itself,
`key.sub=value` on the command line (`scale train run.yaml optim.lr=1e-3 data.sources.0.path=corpus`).
Mappings are merged key by key; everything else, lists too, is replaced as a whole, and so is a mapping whose `kind`
changes. Entries of a list are numbered from 0. `null` takes an optional section back. Unknown keys, keys given twice
and impossible values are errors that name the file, the line and the fix.

A **count** is a positive whole number that may be written short: `64k` is 64,000, `1.5M` is 1,500,000, `300B` is
300,000,000,000. A **name** is made of letters, digits, dots, dashes and underscores. `off` is the word, not a boolean.
"""


def reference() -> str:
    """The page, as Markdown."""
    parts = [INTRODUCTION]
    seen: dict[type[BaseModel], str] = {}
    for run in _members(RunConfig):
        parts += _sections(run, "", f"Runs of `kind: {_kind(run)}`", 2, seen)
    return "\n".join(parts)


def _sections(
    model: type[BaseModel], at: str, title: str, level: int, seen: dict[type[BaseModel], str]
) -> Iterator[str]:
    """This section and, after it, those of its fields; a section that appeared before is only linked to."""
    seen[model] = title
    inner = [(name, field) for name, field in model.model_fields.items() if _members(field.annotation)]
    fresh = [(name, field) for name, field in inner if not any(m in seen for m in _members(field.annotation))]
    titles = {name: f"`{_path(at, name, field)}`" for name, field in fresh}
    links = {m: titles[name] for name, field in fresh for m in _members(field.annotation)} | seen
    yield _heading(title, level)
    yield _text(model) + "\n"
    yield _table(model.model_fields, links)
    for name, field in fresh:
        members = _members(field.annotation)
        path = _path(at, name, field)
        if len(members) == 1:
            yield from _sections(members[0], path, titles[name], level + 1, seen)
        else:
            yield from _union(members, path, titles[name], level + 1, seen)


def _union(
    members: list[type[BaseModel]], at: str, title: str, level: int, seen: dict[type[BaseModel], str]
) -> Iterator[str]:
    """What all members share, then each member by its `kind`."""
    first = members[0].model_fields
    shared = {n: f for n, f in first.items() if n != "kind" and all(_same(m.model_fields.get(n), f) for m in members)}
    yield _heading(title, level)
    kinds = {member: _kind(member) for member in members}
    yield f"Told apart by `kind`: {', '.join(f'`{kind}`' for kind in kinds.values())}. All of them have\n"
    yield _table(shared, seen)
    seen |= dict.fromkeys(members, title)
    for member, kind in kinds.items():
        own = {name: f for name, f in member.model_fields.items() if name != "kind" and name not in shared}
        yield _heading(f"`{at}` of `kind: {kind}`", level + 1)
        yield _text(member) + "\n"
        fresh = {
            m: f"`{_path(at, name, f)}`" for name, f in own.items() for m in _members(f.annotation) if m not in seen
        }
        if own:
            yield _table(own, fresh | seen)
        for model, inner_title in fresh.items():
            yield from _sections(model, inner_title.strip("`"), inner_title, level + 2, seen)


def _table(fields: dict[str, FieldInfo], links: dict[type[BaseModel], str]) -> str:
    rows = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        cells = (f"`{name}`", type_words(field.annotation, field.metadata, links), _default(field), _meaning(field))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def type_words(annotation: Any, metadata: Any = (), links: dict[type[BaseModel], str] | None = None) -> str:
    """A type in the words of someone who writes YAML; sections are links to their headings."""
    links = links or {}
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [part for m in args[1:] for part in (m.metadata if isinstance(m, FieldInfo) else [m])]
        return type_words(args[0], [*inner, *metadata], links)
    if origin in (Union, types.UnionType):
        words = [type_words(arg, (), links) for arg in args if arg is not types.NoneType]
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (list, tuple):
        words = [type_words(arg, (), links) for arg in args]
        return f"list of {words[0]}" if origin is list else f"[{', '.join(words)}]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        title = links[annotation]
        return f"[{title}](#{_anchor(title)})"
    plain = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}.get(annotation, "mapping")
    if annotation is int and is_count(metadata):
        plain = "count"
    if annotation is str and any(getattr(m, "pattern", None) for m in metadata):
        plain = "name"
    return " ".join([plain, " and ".join(_bounds(metadata, plain))]).strip()


def _bounds(metadata: Any, plain: str) -> Iterator[str]:
    for sign, name in ((">", "gt"), ("≥", "ge"), ("<", "lt"), ("≤", "le")):
        for value in [getattr(m, name) for m in metadata if getattr(m, name, None) is not None]:
            if not (plain == "count" and name == "gt"):  # a count is positive anyway
                yield f"{sign} {value}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, BaseModel):
        given = field.default.model_dump(exclude_unset=True)
        return f"`{_flow(given)}`" if given else "its defaults"
    return f"`{_flow(field.default)}`"


def _flow(value: Any) -> str:
    """A value as one would write it into the file."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(sub)}" for key, sub in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _meaning(field: FieldInfo) -> str:
    if field.description:
        return _escaped(field.description)
    members = _members(field.annotation)
    return _text(members[0]) if members else ""


def _text(model: type[BaseModel]) -> str:
    return _escaped(model.__doc__ or "")


def _escaped(text: str) -> str:
    """Docstrings are plain text with `code`; outside of code, Markdown's signs are taken literally."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if i % 2 else re.sub(r"([*<\[\]\\])", r"\\\1", part) for i, part in enumerate(parts))


def _members(annotation: Any) -> list[type[BaseModel]]:
    """Sections inside an annotation such as list[A | B]."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [member for arg in get_args(annotation) for member in _members(arg)]


def _kind(member: type[BaseModel]) -> str:
    """The one `kind` of a member of a union."""
    return str(get_args(member.model_fields["kind"].annotation)[0])


def _same(a: FieldInfo | None, b: FieldInfo) -> bool:
    return a is not None and (a.annotation, a.description, a.default) == (b.annotation, b.description, b.default)


def _path(at: str, name: str, field: FieldInfo) -> str:
    return (f"{at}.{name}" if at else name) + ("[]" if get_origin(field.annotation) is list else "")


def _heading(title: str, level: int) -> str:
    return f"{'#' * level} {title}\n"


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


if __name__ == "__main__":
    print(reference(), end="")
