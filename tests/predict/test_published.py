"""Published are the weights as they are after a jump, an extrapolated update or a jump undone, not as the step left them."""

from __future__ import annotations

import pytest

from scale.parallel.ranks import Ranks
from tests.distributed.harness import run_ranks
from tests.predict.jump_ranks import STEPS
from tests.predict.published_ranks import published


@pytest.mark.parametrize("extrapolation", [False, True], ids=["jumps", "extrapolation"])
@pytest.mark.parametrize("kind", ["single", "fsdp"])
def test_what_is_published_is_what_the_next_step_reads(kind, extrapolation):
    if kind == "single":
        runs = [published(Ranks(), kind, extrapolation)]
    else:
        runs = run_ranks("tests.predict.published_ranks:published", kind=kind, extrapolation=extrapolation)
    for run in runs:
        assert sorted(set(run["versions"])) == list(range(1, STEPS + 1)), (
            "after every step, also one that is only counted"
        )
        assert run["versions"] == sorted(run["versions"]) and run["stale"] == 0
        assert run["kinds"].count("predict") > 3
        moved = [distance for distance in run["moved"][1:] if distance]
        assert max(moved) > 2 * sorted(moved)[len(moved) // 2], "some were carried far"
