"""Bytes on one device, computed by hand for a model of 1,000 parameters of which 600 are trained."""

from __future__ import annotations

from typing import Any

import pytest

from scale.config.run import ComputeConfig
from scale.models.size import Size
from scale.parallel.footprint import Footprint, footprint, trained_here

SIZE = Size(total=1000, trainable=600, matrix=900)


def of(strategy: str, ranks: int, precision: str = "bf16", optim: str = "adamw", **compute: Any) -> Footprint:
    return footprint(SIZE, ComputeConfig.model_validate(compute), optim, strategy, ranks, precision)


def test_one_device_holds_all() -> None:
    """fp32 weights of everything; a gradient and the moments of what is trained."""
    assert of("single", 1) == Footprint(4000, 2400, 4800)
    assert of("single", 1, optim="adamw8bit") == Footprint(4000, 2400, 1200)
    assert of("single", 1, optim="muon") == Footprint(4000, 2400, 3600)
    assert of("single", 1).device == 11_200


@pytest.mark.parametrize(("shard", "weights"), [("all", 500), (8, 500), (2, 2000), (1, 4000)])
def test_fsdp_shares_among_the_ranks_of_one_copy(shard: Any, weights: int) -> None:
    held = of("fsdp", 8, fsdp={"shard": shard})
    assert held == Footprint(weights, weights * 6 // 10, weights * 12 // 10)


def test_fsdp_offload_leaves_nothing_but_what_moves() -> None:
    held = of("fsdp", 4, fsdp={"offload": True})
    assert held.device == 0 and held.host == 1000 + 600 + 1200
    assert of("fsdp", 4, fsdp={"offload": True, "shard": 2}).host == 2000 + 1200 + 2400
    assert of("fsdp", 4, fsdp={"reshard": False}) == Footprint(1000, 600, 1200, gathered=2000)
    assert of("fsdp", 4, "fp32", fsdp={"reshard": False}).gathered == 4000
    assert of("fsdp", 4, fsdp={"reduce": "step"}) == Footprint(1000, 600, 1200, exchange=2400)


def test_zero_keeps_weights_that_compute_whole_in_stage_2() -> None:
    """Masters and two moments: 12 bytes a trained parameter, over 4 ranks."""
    two, three = ({"stage": stage} for stage in (2, 3))
    assert of("deepspeed", 4, deepspeed=two) == Footprint(2000, 600, 1800, exchange=2400)
    assert of("deepspeed", 4, "fp32", deepspeed=two) == Footprint(4000, 600, 1800, exchange=4800)
    assert of("deepspeed", 4, deepspeed=three) == Footprint(500, 600, 1800, gathered=2000, exchange=2400)
    assert of("deepspeed", 4, deepspeed={**two, "offload": True}) == Footprint(2000, 0, 0, exchange=2400, host=2400)
    away = of("deepspeed", 4, deepspeed={**three, "offload": True})
    assert (away.weights, away.gradients, away.optimizer, away.host) == (500, 0, 0, 2400)


@pytest.mark.parametrize(
    ("strategy", "shard", "share"), [("single", "all", 1), ("fsdp", "all", 8), ("fsdp", 2, 2), ("deepspeed", "all", 8)]
)
def test_masters_are_cut_like_the_weights(strategy: str, shard: Any, share: int) -> None:
    compute = ComputeConfig.model_validate({"strategy": strategy, "fsdp": {"shard": shard}} if shard != "all" else {})
    assert trained_here(SIZE, compute, strategy, 8) == SIZE.trainable // share
