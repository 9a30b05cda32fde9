"""Full steps that are carried on: as long as asked for, the same under every strategy, judged as one, undone as one."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from scale.config.predict import PredictConfig
from scale.parallel.ranks import Ranks
from tests.distributed.harness import run_ranks
from tests.parallel.lm import Rows, meta_model, prepared
from tests.predict.jump_ranks import STEPS, Run
from tests.predict.runs import LAST, assert_same_run, cut_back, fit, phases, rows, write
from tests.predict.runs import STEPS as LONGER
from tests.predict.stride_ranks import LONG, RELAX, STRIDES, STRIDING, story, striding
from tests.predict.weights.rank_parts import OPTIM, strategy_of

SLOW = {"marks": pytest.mark.slow}
IN_RUNS = {
    "strides": 3, "horizons": [2], "every": 1,
    "guard": {"correction_interval": 8, "relax": 2, "drift": 1.0, "tolerance": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def one():
    return story(Ranks(), "single")


@pytest.fixture(scope="module", params=["fsdp", pytest.param("zero2", **SLOW), pytest.param("zero3", **SLOW)])
def two(request):
    return run_ranks("tests.predict.stride_ranks:story", kind=request.param, timeout=500)


def test_a_step_is_carried_on_by_its_own_update(one, two):
    for run in [one, *two]:
        assert run["strides"] >= 2 * STRIDES and run["off"] < 1 and run["moved"] > 1e-3


def test_ranks_do_as_one_process(one, two):
    first, second = two
    for key in ("kinds", "losses", "said", "ledger", "credits"):
        assert first[key] == second[key], f"ranks disagree about {key}"
    assert first["kinds"] == one["kinds"] and first["ledger"] == one["ledger"]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-4)


def test_in_mode_always_a_share_of_the_length_is_counted(one):
    assert sum(one["credits"]) == one["ledger"]["predicted"] and len(one["kinds"]) == STEPS
    assert one["lengths"] == [[STRIDES * LONG, STRIDES]] * len(one["credits"])
    assert one["credits"][:2] == [STRIDES * LONG // 2] * 2 and one["kinds"][-1] != "predict"
    assert one["drawn"] == one["ledger"]["full"] + 1, "one step's batch is for checks"


def test_strides_that_are_undone_leave_the_bits_they_began_from(one, two):
    for run in [one, *two]:
        made = STRIDES + RELAX
        assert run["undone"] == {"back": True, "said": True, "rejected": STRIDES * LONG, "balance": -made}


def test_carrying_on_is_adamw_at_a_higher_learning_rate():
    """Moments and decay included: torch's AdamW on the same batches, at 1 + LONG times the rate wherever a step was carried
    on."""
    run = striding(Ranks(), "single", mode="always")
    steps = []
    while run.stepper.full.steps_done < 30:
        drawn, carried = run.source.drawn, len(run.seen)
        (report,) = run.train(1)
        if report.kind != "predict":
            batch = run.source.drawn - 1  # the one before it may have gone to the checks
            assert batch >= drawn
            steps.append((batch, report.lr / run.stepper.full.settings.lr, len(run.seen) > carried, report.loss))
    assert sum(was for _, _, was, _ in steps) >= 2 * STRIDES
    strategy = strategy_of(Ranks(), "single")
    plain = prepared(strategy, *meta_model(), OPTIM)
    for batch, factor, was, loss in steps:
        plain.factor = lambda n, rate=factor * (1 + LONG * was): rate
        assert plain.step(Rows(drawn=batch)).loss == pytest.approx(loss, rel=1e-4)
    with strategy.edit_masters() as shards:
        for name, end in run.masters().items():
            torch.testing.assert_close(end, shards[name].param.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("factor", "made", "ended"), [(1.6, 2, "loss"), (math.nan, 2, "loss"), (1.4, STRIDES, ""), (0.5, STRIDES, "")]
)
def test_strides_end_where_a_check_fails(factor, made, ended):
    """The tolerance is half of the check loss before them."""
    run = striding(Ranks(), "single")
    run.until("stride")
    run.heights = [factor * run.attempts.open.before] * 9
    run.until("correct")
    assert (run.attempts.open.strides, run.attempts.open.ended) == (made, ended)
    run.heights = None
    said = run.train(RELAX)[-1].prediction
    assert (said["strides"], said["kept"], said["ended"]) == (made, made * LONG, ended or None)


def test_the_last_stride_is_checked_however_few_there_are():
    run = striding(Ranks(), "single", guard=STRIDING["guard"] | {"correction_interval": 100})
    run.until("stride")
    run.heights = [100.0]
    run.until("correct")
    assert run.attempts.open.ended == "loss" and run.heights == []


def test_a_skipped_step_among_them_takes_no_check_away():
    run = striding(Ranks(), "single", guard=STRIDING["guard"] | {"correction_interval": 100})
    run.until("stride")
    skipping(run, 1)
    run.heights = [100.0]
    run.until("correct")
    assert (run.attempts.open.strides, run.attempts.open.ended) == (STRIDES - 1, "loss")


def test_weights_that_went_too_far_end_strides():
    run = striding(Ranks(), "single", guard=STRIDING["guard"] | {"drift": 1e-6})
    run.until("correct")
    assert (run.attempts.open.strides, run.attempts.open.ended) == (1, "drift")


def test_what_is_learned_from_strides():
    """The next moment knows that the weights moved on by so many steps, the looks see one longer update, and losses that relax
    teach no noise; what was checked before is no check of these weights."""
    run = striding(Ranks(), "single")
    run.until("stride")
    assert run.attempts.base is None
    for _ in range(2):
        run.train(1)
        factor = run.stepper.full.factor(run.stepper.full.steps_done)
        assert run.stepper.brain.action == (factor, LONG)
        assert (run.stepper.looks.steps, run.stepper.looks.lr) == (1 + LONG, pytest.approx((1 + LONG) * factor))
    run.until("correct")
    seen = run.stepper.brain.signals._noise.mean.seen
    run.until("predict")
    assert run.stepper.brain.signals._noise.mean.seen == seen, "relaxing steps teach no noise"


def skipping(run, steps):
    """The next steps are skipped, as if their gradients were not finite: drawn, nothing applied."""
    full = run.stepper.full
    judge, left = full.spikes.judge, [steps]

    def veto(loss, norm):
        left[0] -= 1
        return "planted" if left[0] >= 0 else judge(loss, norm)

    full.spikes.judge = veto


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_strides_of_which_every_step_is_skipped_are_nothing(mode):
    run, starts = striding(Ranks(), "single", mode=mode), []
    begin, learned = run.attempts.begin_strides, run.stepper.brain.bandit.learned_K.tolist()

    def begun(*arguments):
        found = begin(*arguments)
        if found.tried:
            starts.append(run.bits())
            skipping(run, STRIDES)
        return found

    run.attempts.begin_strides = begun
    run.until("stride")
    run.until("correct")
    assert [run.bits()] == starts and run.seen == []
    said = run.train(RELAX)[-1].prediction
    assert (said["kept"], said["strides"], said["credit"], said["undone"]) == (0, 0, 0, False)
    assert run.attempts.open is None and run.stepper.brain.bandit.learned_K.tolist() == learned
    assert run.attempts.account.balance == 0 and run.stepper.ledger.accepted == 0


def test_a_skipped_step_is_not_carried_on_and_not_made():
    run = striding(Ranks(), "single", mode="auto")
    run.until("stride")
    run.train(1)
    assert len(run.seen) == 2
    skipping(run, 1)
    run.train(STRIDES - 2)
    assert run.attempts.open.strides == STRIDES - 1 == len(run.seen)
    skipping(run, 1)
    run.heights = [100.0]
    said = run.train(RELAX)[-1].prediction
    assert said["undone"] and run.attempts.account.balance == -(STRIDES - 1 + RELAX - 1), "steps that were made"


def test_a_first_policy_is_not_judged_by_a_rate_that_is_not_known():
    run = striding(Ranks(), "single")
    run.until("stride")
    run.until("correct")
    said = run.train(RELAX)[-1].prediction
    assert math.isnan(said["worth"]) and math.isnan(said["reward"]) and said["credit"] > 0
    assert run.stepper.brain.bandit.learned_K.sum() == 0
    run.until("stride")
    run.until("correct")
    assert math.isfinite(run.train(RELAX)[-1].prediction["reward"])
    assert run.stepper.brain.bandit.learned_K.sum() == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fit(write(tmp_path_factory.mktemp("strides"), "striding", LAST | IN_RUNS))


@pytest.mark.parametrize("phase", ["stride", "correct"])
def test_a_run_goes_on_from_the_middle_of_strides(whole, phase, tmp_path):
    assert rows(whole)[-1]["ledger"]["accepted"] >= 1 and rows(whole)[-1]["ledger"]["predicted"] >= 1
    steps = [step for step, found in phases(whole).items() if found == phase and step < LONGER]
    cut_back(whole, steps[1], tmp_path)
    again = fit(whole.parent.parent / "striding.yaml", f"runs_dir={tmp_path}")
    assert_same_run(whole, again)


@pytest.mark.parametrize("change", ["predict.mode=observe", "predict.strides=0"])
def test_strides_are_left_as_they_are_by_a_run_that_makes_none(whole, change, tmp_path):
    step = next(step for step, found in phases(whole).items() if found == "stride")
    run = cut_back(whole, step, tmp_path)
    fit(whole.parent.parent / "striding.yaml", f"runs_dir={tmp_path}", change, allow=["predict"])
    later = [row for row in rows(run) if row["step"] > step]
    assert "stride" not in {row["prediction"]["phase"] for row in later} and len(rows(run)) == LONGER + 1
    assert "credit" not in later[0]["prediction"] and not any("strides" in row["prediction"] for row in later)


@pytest.mark.parametrize(
    "change", [{"coefficients": "line"}, {"every": 2}, {"use": "shadow"}], ids=["coefficients", "every", "use"]
)
def test_settings_that_strides_cannot_work_with_are_refused(change):
    with pytest.raises(
        ValidationError, match=f"strides = 4: carry on the update just made: needs {next(iter(change))} = .*"
    ):
        PredictConfig(**({"directions": ["optimizer"], "coefficients": "last", "strides": 4} | change))


def test_strides_begin_only_where_they_can_be_judged():
    run = Run(Ranks(), "single", **(STRIDING | {"strides": STEPS}))
    for _ in range(STEPS):
        run.train(1)
    assert run.stepper.ledger.attempts == 0
