"""Jumps of the predictive stepper, measured from outside: in one process, and in two that do as one."""

from __future__ import annotations

import pytest

from scale.parallel.ranks import Ranks
from tests.distributed.harness import run_ranks
from tests.predict.jump_ranks import STEPS, story

SLOW = {"marks": pytest.mark.slow}


@pytest.fixture(scope="module")
def one():
    return story(Ranks(), "single")


@pytest.fixture(scope="module", params=["fsdp", pytest.param("zero2", **SLOW), pytest.param("zero3", **SLOW)])
def two(request):
    return run_ranks("tests.predict.jump_ranks:story", kind=request.param, timeout=500)


@pytest.fixture(params=["one", "two"])
def found(request):
    """Each process of each kind of run."""
    made = request.getfixturevalue(request.param)
    return [made] if request.param == "one" else made


def test_weights_move_by_coefficients_times_directions(one, two):
    for rank in [one, *two]:
        climbs = rank["always"]["climbs"]
        assert sum(climb["kept"] > 0 for climb in climbs) >= 2 and max(climb["moved"] for climb in climbs) > 1e-3
        for climb in climbs:
            assert climb["worst"] < 1, "not the sum of coefficient x direction"
            assert climb["moments"], "a jump changed the optimizer"
            assert (climb["kept"] == 0) == climb["same"]
        assert len({round(c / climbs[0]["parts"][0][0], 6) for c in climbs[0]["parts"][0]}) == 11, "all kinds alike"


def test_ranks_decide_the_same_and_as_one_process(one, two):
    first, second = (rank["always"] for rank in two)
    for key in ("kinds", "losses", "said", "ledger", "forwards"):
        assert first[key] == second[key], f"ranks disagree about {key}"
    for climb, other in zip(first["climbs"], second["climbs"], strict=True):
        assert all(climb[key] == other[key] for key in ("parts", "before", "after", "kept", "rejected"))
    assert first["kinds"] == one["always"]["kinds"] and first["ledger"] == one["always"]["ledger"]
    assert first["losses"] == pytest.approx(one["always"]["losses"], rel=1e-5)
    for climb, expected in zip(first["climbs"], one["always"]["climbs"], strict=True):
        assert [climb["before"], climb["after"]] == pytest.approx([expected["before"], expected["after"]], rel=1e-5)


def test_a_run_that_always_jumps_counts_its_steps(one):
    run = one["always"]
    assert len(run["kinds"]) == STEPS and run["kinds"][-1] != "predict"
    assert run["ledger"]["predicted"] == run["kinds"].count("predict") > 5
    assert run["ledger"]["full"] == len(run["losses"]) == STEPS - run["ledger"]["predicted"]
    assert run["drawn"] == run["ledger"]["full"] + 1, "one step's batch is for checks"
    assert sum(run["forwards"]) == 6 * (run["ledger"]["full"] + run["ledger"]["check_forwards"])


def test_a_rejected_jump_leaves_every_bit(one, two):
    for rank in [one, *two]:
        run = rank["rejected"]
        assert run["counts"] == [len(run["climbs"]), 0, 0] and len(run["climbs"]) >= 2
        assert set(run["kinds"]) == {"full"} and run["wait"] == 3, "asked for always: no longer waits"
        for climb in run["climbs"]:
            assert climb["kept"] == 0 and climb["rejected"] > 0 and climb["parts"] == []
            assert climb["same"] and climb["moments"] and climb["forward"][0] == climb["forward"][1]


def test_parts_that_are_taken_back_leave_the_bits_of_the_kept_ones(one, two):
    for rank in [one, *two]:
        alone = rank["alone"]
        assert alone["same"] and alone["back"] and alone["seen"][0] == alone["seen"][1]
        assert alone["kept"] == [3, 3] and alone["parts"][0] == alone["parts"][1]
        whole, half, nan = rank["taken back"]
        assert [len(run["parts"]) for run in (whole, half, nan)] == [1, 2, 1]
        assert max(run["worst"] for run in (whole, half, nan)) < 1
        step = [b - a for a, b in zip(half["reach"][2], half["reach"][3], strict=True)]
        assert half["parts"][1] == pytest.approx(step)  # 3 // 2 steps instead of 3
        assert nan["parts"][0] == pytest.approx(nan["reach"][0])


def test_an_undone_jump_restores_the_snapshot(one, two):
    for rank in [one, *two]:
        run = rank["undone"]
        assert run["ends"] == [{"back": True, "moments": True}] and run["said"] is True
        assert run["counts"] == [0, 0] and run["rejected"] >= run["kept"] > 0
        assert run["forward"][0] == run["forward"][1] and set(run["kinds"]) == {"full"}
