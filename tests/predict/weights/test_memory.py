from __future__ import annotations

import pytest
import torch

from scale.errors import UsageError
from scale.parallel.ranks import Ranks
from scale.parallel.single import Single
from scale.predict.shadow import Shadow
from scale.predict.weights.carry import Carry
from scale.predict.weights.jump import Jump
from scale.predict.weights.look import Looks
from scale.predict.weights.memory import GIB, ON_CPU, check_budget, footprint, on_device
from scale.predict.weights.runs import runs
from tests.parallel.lm import meta_model, prepared
from tests.predict.weights.parts import drawn, shards_of

JUMPS = ("snapshot", "landing", "working")
ALL = ("drift", "window", "optimizer", "singular", "masked_slope")


@pytest.mark.parametrize("directions", [(), ("drift",), ("masked_slope", "window"), ALL])
def test_the_footprint_is_what_checkpoints_hold(directions):
    shards = shards_of(drawn(0))
    numel = sum(s.param.numel() for s in shards.values())
    looks = Looks(Ranks(), shards, directions, carry=Carry(Ranks(), shards))
    kept = {t.data_ptr(): 4 * t.numel() for tensors in looks.companions().values() for t in tensors.values()}
    parts = footprint(numel, directions, offload=False)
    assert sum(kept.values()) == sum(size for what, size in parts.items() if what not in JUMPS)
    assert all(parts[what] == 4 * numel for what in JUMPS)


@pytest.mark.parametrize("use", ["adopt", "shadow"])
def test_what_a_jump_keeps_is_in_the_footprint(use):
    strategy = Single()
    prepared(strategy, *meta_model())
    with strategy.edit_masters() as shards:
        names, numel = list(shards), sum(shard.param.numel() for shard in shards.values())
    jump, shadow = Jump(strategy), Shadow(strategy)
    jump.snapshot()
    if use == "adopt":
        jump.land()
        kept = jump.companions(names)
    else:
        shadow.offer(1, 1.0)
        kept = {"jump.snapshot": dict(zip(names, jump._snapshot, strict=True))} | shadow.companions()
    size = sum(4 * t.numel() for tensors in kept.values() for t in tensors.values())
    parts = footprint(numel, (), offload=False, use=use)
    assert size == sum(parts[what] for what in ("snapshot", "landing", "shadow") if what in parts) == 8 * numel
    offloaded = footprint(numel, (), offload=True, use=use)
    assert offloaded[ON_CPU] == 4 * numel * (2 if use == "adopt" else 1)
    assert sum(offloaded.values()) == sum(parts.values())


def test_a_budget_that_is_too_small_is_refused_in_one_line():
    parts = footprint(2**28, ("drift", "masked_slope"), offload=False)
    assert on_device(parts) == 10 * GIB
    check_budget(10.0, parts)
    check_budget(None, parts)
    with pytest.raises(
        UsageError, match=r"predict\.guard\.memory = 8\.5: prediction needs 10 GiB.*offload=true"
    ) as error:
        check_budget(8.5, parts)
    assert "\n" not in str(error.value) and "masked_slope 3" in str(error.value)


def test_an_offloaded_snapshot_is_not_on_the_device():
    parts = footprint(2**28, ("drift",), offload=True)
    assert parts[ON_CPU] == 2 * GIB and on_device(parts) == 5 * GIB
    check_budget(5.0, parts)
    with pytest.raises(UsageError, match=r"needs 5 GiB") as error:
        check_budget(4.0, parts)
    assert "offload" not in str(error.value)


def test_runs_hold_all_in_order():
    tensors = [torch.empty(n) for n in (3, 0, 4, 12, 1, 9, 0)]
    assert [(s.start, s.stop) for s in runs(tensors, most=7)] == [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    assert not list(runs([]))
