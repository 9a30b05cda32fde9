"""New weights are published as they are after a jump, a step carried on or a jump undone, not as the full step left them."""

from __future__ import annotations

import pytest

from scale.parallel.ranks import Ranks
from tests.distributed.harness import run_ranks
from tests.predict.jump_ranks import STEPS
from tests.predict.published_ranks import published


@pytest.mark.parametrize("strides", [False, True], ids=["jumps", "strides"])
@pytest.mark.parametrize("kind", ["single", "fsdp"])
def test_what_is_published_is_what_the_next_step_reads(kind, strides):
    if kind == "single":
        runs = [published(Ranks(), kind, strides)]
    else:
        runs = run_ranks("tests.predict.published_ranks:published", kind=kind, strides=strides)
    for run in runs:
        assert sorted(set(run["versions"])) == list(range(1, STEPS + 1)), (
            "after every step, also one that is only counted"
        )
        assert run["versions"] == sorted(run["versions"]) and run["stale"] == 0
        assert run["kinds"].count("predict") > 3
        moved = [distance for distance in run["moved"][1:] if distance]
        assert max(moved) > 2 * sorted(moved)[len(moved) // 2], "some were carried far"
