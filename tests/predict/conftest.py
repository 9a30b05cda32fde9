"""Runs that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.predict.runs import LAST, WORLD, fit, write


@pytest.fixture(scope="session")
def jumping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in mode auto that jumped along the last update."""
    return fit(write(tmp_path_factory.mktemp("last"), "jumping", LAST))


@pytest.fixture(scope="session")
def imagining(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in mode auto whose jumps were as long as the world model said."""
    return fit(write(tmp_path_factory.mktemp("world"), "imagining", WORLD))
