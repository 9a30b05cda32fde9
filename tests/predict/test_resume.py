"""A predictive run that dies after any step goes on bit for bit; prediction may begin or end in the middle of a run."""

from __future__ import annotations

import json

import pytest

from scale.errors import ScaleError
from tests.predict.runs import (
    LAST,
    STEPS,
    assert_same_run,
    cut_back,
    fit,
    last,
    phases,
    rows,
    state,
    tensors,
    write,
)

PHASES = ["warmup", "full", "settle", "predict"]


def check_resume(run, step, folder):
    """Die after `step`, go on, and compare."""
    path = run.parent.parent / f"{run.name}.yaml"
    cut_back(run, step, folder / "again")
    again = fit(path, f"runs_dir={folder / 'again'}")
    assert_same_run(run, again)


@pytest.mark.parametrize("phase", PHASES)
def test_goes_on_from_each_phase(jumping, phase, tmp_path):
    steps = [step for step, found in phases(jumping).items() if found == phase and 2 < step < STEPS]
    step = steps[-1] if phase == "warmup" else steps[len(steps) // 2]
    check_resume(jumping, step, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("made", ["jumping", "imagining"])
def test_goes_on_from_steps_all_over_the_run(made, tmp_path, request):
    run = request.getfixturevalue(made)
    assert rows(run)[-1]["ledger"]["accepted"] >= 2 and set(phases(run).values()) == set(PHASES)
    for step in range(1, STEPS, 3):
        check_resume(run, step, tmp_path / str(step))


def other(run, step, folder, name, predict, *allow):
    """Go on after `step` of a run under another section."""
    cut_back(run, step, folder / "runs")
    return fit(write(folder, name, predict), allow=allow)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return fit(write(tmp_path_factory.mktemp("plain"), "plain"))


def corpus_of(run, folder):
    """The same data elsewhere."""
    folder.joinpath("corpus.jsonl").write_bytes((run.parent.parent / "corpus.jsonl").read_bytes())


def test_prediction_begins_in_the_middle_of_a_run(plain, tmp_path):
    run = cut_back(plain, 10, tmp_path)
    path = plain.parent.parent / "plain.yaml"
    changes = [f"predict.{key}={json.dumps(value)}" for key, value in LAST.items()]
    fit(path, f"runs_dir={tmp_path}", *changes, allow=["predict"])
    said = rows(run)
    assert said[:11] == rows(plain)[:11] and said[11]["loss"] == rows(plain)[11]["loss"]
    assert said[10]["ledger"] is None and said[-1]["ledger"]["accepted"] >= 1
    assert said[-1]["ledger"]["full"] + said[-1]["ledger"]["predicted"] == STEPS - 10


@pytest.mark.parametrize("phase", ["settle", "predict"])
def test_prediction_ends_in_the_middle_of_a_run(jumping, phase, tmp_path):
    """Training goes on from the weights as they are; what prediction had left is not carried along."""
    step = next(step for step, found in phases(jumping).items() if found == phase)
    run = cut_back(jumping, step, tmp_path)
    path = jumping.parent.parent / "jumping.yaml"
    fit(path, f"runs_dir={tmp_path}", "predict.enabled=false", allow=["predict.enabled"])
    said = rows(run)
    assert said[: step + 1] == rows(jumping)[: step + 1] and len(said) == STEPS + 1
    assert {row["phase"] for row in said[step + 1 :]} == {"full"} and said[-1]["ledger"] is None
    assert "predict" not in state(run)["stepper"] and not tensors(run, "predict/")


def test_the_state_of_an_older_version_is_refused_with_what_to_do(jumping, tmp_path, monkeypatch):
    run = cut_back(jumping, 20, tmp_path)
    path = jumping.parent.parent / "jumping.yaml"
    monkeypatch.setattr("scale.predict.stepper.STATE_VERSION", 3)
    with pytest.raises(
        ScaleError, match=r"written by an older version.*predict\.enabled=false --allow-change"
    ) as found:
        fit(path, f"runs_dir={tmp_path}")
    assert "\n" not in str(found.value) and last(run).step == 20
    fit(path, f"runs_dir={tmp_path}", "predict.enabled=false", allow=["predict.enabled"])
    assert len(rows(run)) == STEPS + 1


def test_guard_and_mode_may_change(jumping, tmp_path):
    run = cut_back(jumping, 20, tmp_path)
    path = jumping.parent.parent / "jumping.yaml"
    fit(path, f"runs_dir={tmp_path}", "predict.mode=observe", "predict.guard.settle_steps=3", allow=["predict"])
    assert len(rows(run)) == STEPS + 1
    assert rows(run)[-1]["ledger"]["attempts"] == rows(run)[20]["ledger"]["attempts"]


def test_an_open_jump_is_left_as_it_is_by_a_run_that_only_observes(jumping, tmp_path):
    """In the middle of settling, or of counting: from there on every step is a full one."""
    path = jumping.parent.parent / "jumping.yaml"
    phases = {row["step"]: row["prediction"]["phase"] for row in rows(jumping) if row["prediction"]}
    for phase in ("settle", "predict"):
        step = next(step for step, name in phases.items() if name == phase)
        folder = tmp_path / phase
        run = cut_back(jumping, step, folder)
        fit(path, f"runs_dir={folder}", "predict.mode=observe", allow=["predict"])
        assert {row["phase"] for row in rows(run) if row["step"] > step} == {"full"}


@pytest.mark.parametrize(
    "change",
    ["directions=[masked_slope]", "directions=[optimizer,masked_slope]", "horizons=[6]", "world.hidden=7", "world.members=3",
     "world.latent=3", "world.replay=64"],
)  # fmt: skip
def test_what_the_state_was_made_for_must_not_change(change, jumping, tmp_path):
    run = cut_back(jumping, 20, tmp_path)
    path = jumping.parent.parent / "jumping.yaml"
    with pytest.raises(ScaleError) as found:
        fit(path, f"runs_dir={tmp_path}", "predict.coefficients=line", f"predict.{change}", allow=["predict"])
    assert f"predict.{change.split('=')[0]}" in str(found.value) and "\n" not in str(found.value)
    assert last(run).step == 20
