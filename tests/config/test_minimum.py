"""The versions that `make test-minimum` runs the fast tests on are those that pyproject.toml declares."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tested = [Requirement(line) for line in (*project["dependencies"], *extras["dev"])]
    inner = [Requirement(line) for r in tested for extra in r.extras for line in extras.get(extra, [])]
    bounds = {r.name: [s.version for s in r.specifier if s.operator == ">="] for r in (*tested, *inner)}
    return {name: found[0] for name, found in bounds.items() if found}


def test_every_declared_minimum_is_the_one_that_is_tested():
    lines = (ROOT / "constraints-minimum.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = declared()
    assert pinned.keys() == wanted.keys()
    for name, least in wanted.items():
        assert pinned[name].removesuffix(".0").removesuffix(".0") == least.removesuffix(".0"), name
