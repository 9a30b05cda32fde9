"""Companions of the masters between one process and several, and between ways to cut."""

from __future__ import annotations

import pytest

from scale.parallel.ranks import Ranks
from tests.distributed.harness import run_ranks
from tests.parallel.companion_ranks import KEYS, SHAPES, pairs, read, round_trips, write

NAMES = sorted(f"predict/{key}/{name}" for key in KEYS for name in SHAPES)
REFUSED = [
    "the checkpoint does not fit: predict/window/embed.weight is not there",
    "the checkpoint does not fit: predict/drift/norm.weight has the shape (2, 2), not (5,)",
]


def test_one_process_alone(tmp_path):
    assert write(Ranks(), "rows", tmp_path) == NAMES
    for kind in ("rows", "flat"):
        assert read(Ranks(), kind, tmp_path) == {"same": True, "held": NAMES, "refused": REFUSED}


def test_two_processes_to_one_and_back_however_cut(tmp_path):
    write(Ranks(), "rows", tmp_path / "one")
    target = f"{round_trips.__module__}:{round_trips.__name__}"
    ranks = run_ranks(target, folder=str(tmp_path))
    for kind in ("rows", "flat", "copies"):
        assert sorted(ranks[0][kind]["owned"] + ranks[1][kind]["owned"]) == NAMES
        assert read(Ranks(), "flat", tmp_path / kind)["same"]
        for rank in ranks:
            assert rank["from one"][kind]["same"] and rank["from one"][kind]["refused"] == REFUSED
            assert rank[kind]["rows"]["same"] and rank[kind]["flat"]["same"]
            assert 0 < len(rank[kind]["rows"]["held"]) < len(NAMES)


@pytest.mark.slow
def test_copies_of_shards_count_once(tmp_path):
    ranks = run_ranks(f"{pairs.__module__}:{pairs.__name__}", 4, folder=str(tmp_path))
    assert all(found["same"] for _, found in ranks) and sorted(n for owned, _ in ranks for n in owned) == NAMES
    assert read(Ranks(), "rows", tmp_path)["same"]
