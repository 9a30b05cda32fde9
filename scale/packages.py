"""Which packages this framework requires, and whether they are here. Judged by their metadata, never by importing them: some
take seconds, some raise anything on import."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

DISTRIBUTION = "scale-trainer"
DEVELOPERS = "dev"
"""The extra that is no part of the product."""


@dataclass(frozen=True)
class Unmet:
    """A requirement that is not met; `installed` is the version that is there instead, if any."""

    requirement: Requirement
    installed: str | None

    def __str__(self) -> str:
        name, needed = self.requirement.name, self.requirement.specifier
        if self.installed is None:
            return f"{name} is not installed"
        return f"{name} {self.installed} is installed, but {needed} is needed"


@lru_cache
def source_tree() -> dict[str, Any] | None:
    """The `project` table of the pyproject.toml beside the package; None for one that was installed from a wheel. Where it
    is there it counts, as the metadata of a checkout are those of the day it was installed, if it was."""
    path = Path(__file__).parents[1] / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    except OSError:
        return None
    return project if project.get("name") == DISTRIBUTION else None


def requirements(distribution: str, extra: str = "") -> list[Requirement]:
    """What a distribution requires on this machine: always, or in addition for an extra."""
    project = source_tree() if distribution == DISTRIBUTION else None
    if project is not None:
        listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
        return [r for r in map(Requirement, listed) if r.marker is None or r.marker.evaluate()]
    found = []
    for requirement in map(Requirement, metadata.requires(distribution) or []):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always if not extra else (not always and marker is not None and marker.evaluate({"extra": extra})):
            found.append(requirement)
    return found


def unmet(requirement: Requirement) -> list[Unmet]:
    """Why a requirement, with its extras, is not met; empty if it is."""
    installed = version(requirement.name)
    if installed is None or not requirement.specifier.contains(installed, prereleases=True):
        return [Unmet(requirement, installed)]
    inner = [part for extra in sorted(requirement.extras) for part in requirements(requirement.name, extra)]
    return [problem for part in inner for problem in unmet(part)]


def version(distribution: str) -> str | None:
    """Installed version, None if it is not installed; of this framework that of its source tree, where it runs from one."""
    project = source_tree() if distribution == DISTRIBUTION else None
    if project is not None:
        return str(project["version"])
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def extra_names() -> list[str]:
    """The extras of this framework."""
    project = source_tree()
    if project is not None:
        return list(project["optional-dependencies"])
    return metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []


def installed() -> list[tuple[str, str, str]]:
    """Python and every package this framework cannot do without: name, version here, versions that do."""
    if version(DISTRIBUTION) is None:
        return [("python", platform.python_version(), "")]
    project = source_tree()
    wanted = project["requires-python"] if project is not None else metadata.metadata(DISTRIBUTION)["Requires-Python"]
    needed = [(r.name, version(r.name) or "missing", str(r.specifier)) for r in requirements(DISTRIBUTION)]
    return [("python", platform.python_version(), wanted), (DISTRIBUTION, version(DISTRIBUTION) or "", ""), *needed]


def extras() -> tuple[list[str], list[str]]:
    """Names of the extras that are installed, and of those that are not or not in a version that does."""
    if version(DISTRIBUTION) is None:
        return [], []
    names = [name for name in extra_names() if name != DEVELOPERS]
    here = [name for name in names if not any(unmet(r) for r in requirements(DISTRIBUTION, name))]
    return here, [name for name in names if name not in here]


def install_line(extras: Iterable[str]) -> str:
    """How to install extras: by name where metadata say what is in them, else from the source tree."""
    names = ",".join(extras)
    try:
        metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return f"pip install -e '{Path(__file__).parents[1]}[{names}]'"
    return f"pip install '{DISTRIBUTION}[{names}]'"


def package_problems() -> list[str]:
    """Required packages that are missing or out of range, and installed optional ones out of range."""
    if version(DISTRIBUTION) is None:
        return [f"{DISTRIBUTION} is not installed: run pip install -e . in its checkout"]
    problems = [
        f"{problem}: pip install '{problem.requirement.name}{problem.requirement.specifier}'"
        for requirement in requirements(DISTRIBUTION)
        for problem in unmet(requirement)
    ]
    for extra in extra_names():
        if extra != DEVELOPERS:
            outdated = [p for r in requirements(DISTRIBUTION, extra) for p in unmet(r) if p.installed is not None]
            problems += [f"{problem} for the extra {extra}: {install_line([extra])}" for problem in outdated]
    return problems
