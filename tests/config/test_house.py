"""How the rooms of the house stand on each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Ground first. A room may import rooms below it, never above; rooms on one line share a floor.
FLOORS = [
    ["errors"],
    ["files", "lifeline", "streams", "hub", "cards", "packages"],
    ["sealed"],
    ["protocols"],
    ["config"],
    ["hardware"],
    ["data"],
    ["models"],
    ["objectives"],
    ["parallel"],
    ["train"],
    ["predict"],
    ["forecast"],
    ["checkpoint"],
    ["evaluate"],
    ["monitor"],
    ["trainer"],
    ["checks", "choices", "same_run"],
    ["facts"],
    ["build", "load"],
    ["plan"],
    ["api", "doctor"],
    ["cluster"],
    ["cli"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# (importing file, imported room): why it is allowed.
EXCEPTIONS = {
    ("protocols.py", "config"): "for the type checker only: a Strategy is given an OptimConfig",
    ("protocols.py", "parallel"): "for the type checker only: a Strategy has Ranks, a class without variants",
}


def imported_rooms(path: Path) -> Iterator[str]:
    """Rooms of scale that a file names in any import, also inside functions and `if TYPE_CHECKING`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if package == "scale" and room and not room.startswith("__"):
                yield room


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "scale").parts[0].removesuffix(".py")


def files() -> list[Path]:
    return [path for path in sorted((ROOT / "scale").rglob("*.py")) if path != ROOT / "scale" / "__init__.py"]


def shown(path: Path) -> str:
    return path.relative_to(ROOT / "scale").as_posix()


@pytest.mark.parametrize("path", files(), ids=shown)
def test_nobody_imports_upstairs(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"scale/{room} has no floor yet: say in FLOORS where it stands"
    for other in sorted(set(imported_rooms(path))):
        if (shown(path), other) in EXCEPTIONS or other == room:
            continue
        assert FLOOR[other] < FLOOR[room], f"{shown(path)} imports scale.{other}, which does not stand below it"


def test_exceptions_are_still_needed() -> None:
    for name, room in EXCEPTIONS:
        path = ROOT / "scale" / name
        assert FLOOR[room] >= FLOOR[room_of(path)]
        assert room in set(imported_rooms(path)), f"{name} no longer imports scale.{room}"


def test_import_scanner() -> None:
    assert {"errors", "config", "models"} <= set(imported_rooms(ROOT / "scale" / "build.py"))


def test_kernels_is_no_package() -> None:
    """It would shadow the Hugging Face package of that name, which transformers imports."""
    assert (ROOT / "kernels" / "scale_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()
