"""FP8 (emulated) and the loss in chunks on two ranks with sharded weights, against one device."""

import pytest

from tests.distributed.harness import run_ranks
from tests.parallel.fp8_ranks import on_one

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def two():
    return run_ranks("tests.parallel.fp8_ranks:on_two", 2)


def test_fp8_shards_as_other_weights_do(two):
    """Scales of activations belong to a micro-batch, and those differ: equal within FP8's rounding only."""
    exact, single, sharded = on_one(), on_one(precision="fp8"), two[0]["fp8"]
    assert sharded["loss"] == two[1]["fp8"]["loss"] and sharded["digest"] == two[1]["fp8"]["digest"]
    assert sharded["names"] == single["names"] == exact["names"]
    assert sharded["loss"] == pytest.approx(single["loss"], rel=2e-3) and sharded["loss"] != exact["loss"]


def test_weights_gathered_in_fp8(two):
    plain, gathered = two[0]["fp8"], two[0]["gathered"]
    assert gathered["names"] == plain["names"]
    assert gathered["loss"] == pytest.approx(plain["loss"], rel=1e-4)  # the scale of a weight is the whole weight's


def test_chunks_of_a_gathered_head(two):
    exact, chunked = on_one(), two[0]["chunked"]
    assert chunked["loss"] == pytest.approx(exact["loss"], rel=1e-5)
    assert chunked["norm"] == pytest.approx(exact["norm"], rel=1e-4)
    assert chunked["after"] == pytest.approx(exact["after"], rel=1e-4)
