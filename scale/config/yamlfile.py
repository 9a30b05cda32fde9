"""Safe YAML with the field's habits: `3e-4` is a number, `off` a word, every value knows its line, no key comes twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from scale.errors import UsageError

Path_ = tuple[str | int, ...]

MAX_DEPTH = 50
MAX_VALUES = 100_000
"""Aliases can make a small file expand without end; no config is near these."""


_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive",
}
_PROBLEMS = {
    "found character '\\t'": "a tab; indent with spaces",
    "but found another document": "a second document after ---; one file holds one",
}
"""Of the YAML library's messages those that do not say what to do."""


class BadYaml(Exception):
    """What is wrong with a text, and on which line (from 1) if that is known."""

    def __init__(self, problem: str, line: int | None = None):
        super().__init__(problem)
        self.line = line


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its dates and without yes/no/on/off as booleans: `compile: off` means the word."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in pairs if not tag.endswith((":timestamp", ":bool"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rsplit(":", 1)[-1] in ("null", "bool", "int", "float", "str", "seq", "map")
    }


class _Dumper(yaml.SafeDumper):
    """Quotes what either our loader or a plain YAML 1.1 loader would not read as text."""


# YAML 1.1 reads 3e-4 as a string (it wants 3.0e-4); every learning rate in the field is written without the dot.
_NUMBER = re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def parse_value(text: str) -> Any:
    """One YAML value as given on a command line. Raises BadYaml."""
    return _parse(text)[0]


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Path_, int]]:
    """Content of a YAML mapping and the line (from 1) of every key path in it. Raises UsageError."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file (working folder {Path.cwd()})") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read as a YAML file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        if encoding := next((name for mark, name in _MARKS.items() if raw.startswith(mark)), None):
            raise UsageError(f"{path}: is {encoding}; save the file as UTF-8 text") from None
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[Path_, int]]:
    """As `read_yaml`, of a text that came from `path`. Raises UsageError."""
    try:
        content, lines = _parse(text)
    except BadYaml as error:
        place = path if error.line is None else f"{path}:{error.line}"
        raise UsageError(f"{place}: {error}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        found = "a list" if isinstance(content, list) else repr(content)[:80]
        raise UsageError(f"{path}: expected a mapping of keys such as `name: mine`, found {found}")
    return content, lines


def write_yaml(content: Any) -> str:
    """Text that `read_yaml` turns into the same content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str) -> tuple[Any, dict[Path_, int]]:
    lines: dict[Path_, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _mark(node, (), lines)
        return _unshared(loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        problem = next((ours for theirs, ours in _PROBLEMS.items() if theirs in str(error.problem)), error.problem)
        raise BadYaml(f"not valid YAML ({problem})", line) from None
    except yaml.reader.ReaderError as error:
        code, line = int(error.character), text.count("\n", 0, int(error.position)) + 1
        raise BadYaml(f"holds the control character 0x{code:02x}; save the file as plain UTF-8 text", line) from None
    except (yaml.YAMLError, ValueError) as error:
        raise BadYaml(f"not valid YAML ({str(error).splitlines()[0]})") from None
    except RecursionError:
        raise BadYaml("nested too deeply") from None


def _mark(node: yaml.Node, at: Path_, lines: dict[Path_, int]) -> None:
    """Note the line of every path below a node."""
    line = node.start_mark.line + 1
    if len(at) > MAX_DEPTH:
        raise BadYaml("nested too deeply", line)
    if len(lines) > MAX_VALUES:
        raise BadYaml(f"more than {MAX_VALUES:,} values", line)
    lines.setdefault(at, line)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise BadYaml("a key must be a word", line)
            if key.value in seen:
                raise BadYaml(f"{key.value} is given twice", line)
            seen.add(key.value)
            lines[(*at, key.value)] = line
            _mark(value, (*at, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _mark(value, (*at, i), lines)


def _unshared(value: Any) -> Any:
    """A copy in which aliases are values of their own, so that overriding one leaves the others alone."""
    if isinstance(value, dict):
        return {key: _unshared(sub) for key, sub in value.items()}
    if isinstance(value, list):
        return [_unshared(sub) for sub in value]
    return value
