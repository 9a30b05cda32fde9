"""The cluster of these tests, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.slurm.harness import Cluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes; skips where Slurm is not installed or namespaces are not allowed."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster() as running:
        yield running
