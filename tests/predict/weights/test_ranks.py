"""Statistics, jumps and their checkpoints in two real processes, against one process that sees all rows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scale.parallel.ranks import Ranks
from tests.distributed.harness import run_ranks
from tests.predict.weights.rank_parts import continued, story

SLOW = {"marks": pytest.mark.slow}
KINDS = ["fsdp", "zero3", pytest.param("hsdp", **SLOW), pytest.param("zero2", **SLOW)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return story(Ranks(), "single", str(tmp_path_factory.mktemp("single")))


@pytest.fixture(scope="module", params=KINDS)
def two(request, tmp_path_factory):
    kind, folder = request.param, str(tmp_path_factory.mktemp(request.param))
    return kind, folder, run_ranks("tests.predict.weights.rank_parts:story", kind=kind, folder=folder, timeout=500)


def check(found):
    """What holds under every strategy."""
    looked, plain, later, plain_later, resumed = found["losses"]
    assert looked == plain and found["same"], "observing changed training"
    jump = found["jump"]
    assert jump["back"] and jump["untouched"] and jump["again"] and jump["zero"] == 0
    before, after, back = jump["losses"]
    assert before == back != after and abs(after - before) > 1e-3 and 0 < jump["drift"] < 1 and jump["moved"] == 1
    assert found["resumed"] == [True, True], "a resumed run went elsewhere"
    assert later == plain_later == resumed


def near(found, expected, rtol=2e-3):
    found, expected = np.array(found, dtype=float), np.array(expected, dtype=float)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.nanmax(abs(expected)) / 10)


def test_one_process(one):
    check(one)
    assert sum(x is not None for x in one["seen"]["carry"]) == 11 and np.nanmax(one["seen"]["carry"]) > 0.05


def test_two_processes_do_as_one(one, two):
    kind, _, (first, second) = two
    check(first)
    check(second)
    assert {copies for *_, copies in first["parts"].values()} == {2 if kind == "hsdp" else 1}
    assert (first["parts"] == second["parts"]) == (kind == "hsdp")
    for key in ("seen", "state"):
        assert json.dumps(first[key]) == json.dumps(second[key]), f"ranks disagree about {key}"
    assert first["jump"]["digests"] == second["jump"]["digests"]
    assert first["losses"][0] == pytest.approx(one["losses"][0], rel=1e-4)
    assert first["jump"]["drift"] == pytest.approx(one["jump"]["drift"], rel=1e-3)
    assert first["jump"]["losses"] == pytest.approx(one["jump"]["losses"], rel=1e-3)


def test_two_processes_see_what_one_sees(one, two):
    _, _, (found, _) = two
    seen, expected = found["seen"], one["seen"]
    assert seen["elements"] == expected["elements"]
    for column in range(12):
        near(np.array(seen["table"])[:, column], np.array(expected["table"])[:, column])
    near(seen["carry"], expected["carry"], 1e-2)
    assert set(expected["products"]) == set(seen["products"])
    for name, products in seen["products"].items():
        near(products, expected["products"][name], 0.05 if name == "masked_slope" else 5e-3)


def test_one_process_goes_on_where_two_stopped(two):
    _, folder, (saved, _) = two
    found = continued(Ranks(), folder, saved["state"])
    assert found["same"]
    assert found["losses"] == pytest.approx(saved["losses"][2], rel=1e-4)
    for name in found["seen"]["products"]:
        near(found["seen"]["products"][name], saved["seen"]["products"][name], 1e-5)
