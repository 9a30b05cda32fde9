from __future__ import annotations

import pytest
import torch

from scale.parallel.ranks import Ranks
from scale.parallel.single import Single
from scale.predict.weights.jump import Jump
from scale.predict.weights.memory import footprint
from scale.predict.weights.runs import runs
from scale.predict.weights.statistics import StatisticsHook
from tests.parallel.lm import meta_model, prepared
from tests.predict.weights.parts import drawn, shards_of

JUMP = ("snapshot", "landing")


@pytest.mark.parametrize("directions", [(), ("optimizer",), ("masked_slope", "optimizer")])
def test_the_footprint_is_what_checkpoints_hold(directions):
    shards = shards_of(drawn(0))
    numel = sum(s.param.numel() for s in shards.values())
    hook = StatisticsHook(Ranks(), shards, directions)
    kept = {t.data_ptr(): 4 * t.numel() for tensors in hook.tensors().values() for t in tensors.values()}
    parts = footprint(numel, directions)
    assert sum(kept.values()) == sum(size for name, size in parts.items() if name not in (*JUMP, "working"))


def test_what_a_jump_keeps_is_in_the_footprint():
    strategy = Single()
    prepared(strategy, *meta_model())
    with strategy.edit_masters() as shards:
        names, numel = list(shards), sum(shard.param.numel() for shard in shards.values())
    jump = Jump(strategy)
    jump.snapshot()
    jump.land()
    size = sum(4 * t.numel() for tensors in jump.tensors(names).values() for t in tensors.values())
    assert size == sum(footprint(numel, ())[name] for name in JUMP) == 8 * numel


def test_runs_hold_all_in_order():
    tensors = [torch.empty(n) for n in (3, 0, 4, 12, 1, 9, 0)]
    assert [(s.start, s.stop) for s in runs(tensors, most=7)] == [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    assert not list(runs([]))
