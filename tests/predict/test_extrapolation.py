"""Update extrapolation: as long as asked for, the same under every strategy, tested as one, undone as one."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from scale.config.predict import PredictConfig
from scale.errors import UsageError
from scale.parallel.ranks import Ranks
from tests.distributed.harness import run_ranks
from tests.parallel.lm import Rows, meta_model, prepared
from tests.predict.extrapolation_ranks import EXTRAPOLATING, RATIO, SETTLE, STEPS_IN_ROW, extrapolating, story
from tests.predict.jump_ranks import STEPS, Run
from tests.predict.runs import LAST, assert_same_run, cut_back, fit, phases, rows, write
from tests.predict.runs import STEPS as RATIOER
from tests.predict.weights.rank_parts import OPTIM, strategy_of

SLOW = {"marks": pytest.mark.slow}
IN_RUNS = {
    "extrapolation_steps": 3, "extrapolation_ratio": 2, "every": 1,
    "guard": {"correction_interval": 8, "settle_steps": 2, "drift": 1.0, "tolerance": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def one():
    return story(Ranks(), "single")


@pytest.fixture(scope="module", params=["fsdp", pytest.param("zero2", **SLOW), pytest.param("zero3", **SLOW)])
def two(request):
    return run_ranks("tests.predict.extrapolation_ranks:story", kind=request.param, timeout=500)


def test_an_update_is_repeated(one, two):
    for run in [one, *two]:
        assert run["extrapolated"] >= 2 * STEPS_IN_ROW and run["off"] < 1 and run["moved"] > 1e-3


def test_ranks_do_as_one_process(one, two):
    first, second = two
    for key in ("kinds", "losses", "said", "ledger", "credits"):
        assert first[key] == second[key], f"ranks disagree about {key}"
    assert first["kinds"] == one["kinds"] and first["ledger"] == one["ledger"]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-4)


def test_in_mode_always_a_share_of_the_length_is_counted(one):
    assert sum(one["credits"]) == one["ledger"]["predicted"] and len(one["kinds"]) == STEPS
    assert one["lengths"] == [[STEPS_IN_ROW * RATIO, STEPS_IN_ROW]] * len(one["credits"])
    assert one["credits"][:2] == [STEPS_IN_ROW * RATIO // 2] * 2 and one["kinds"][-1] != "predict"
    assert one["drawn"] == one["ledger"]["full"] + 1, "one step's batch is for checks"


def test_undone_extrapolation_leaves_the_bits_it_began_from(one, two):
    for run in [one, *two]:
        made = STEPS_IN_ROW + SETTLE
        assert run["undone"] == {"back": True, "said": True, "rejected": STEPS_IN_ROW * RATIO, "balance": -made}


def test_extrapolation_is_adamw_at_a_higher_learning_rate():
    """Moments and decay included: torch's AdamW on the same batches, at 1 + RATIO times the rate wherever an update was
    repeated."""
    run = extrapolating(Ranks(), "single", mode="always")
    steps = []
    while run.stepper.full.steps_done < 30:
        drawn, carried = run.source.drawn, len(run.seen)
        (report,) = run.train(1)
        if report.kind != "predict":
            batch = run.source.drawn - 1  # the one before it may have gone to the checks
            assert batch >= drawn
            steps.append((batch, report.lr / run.stepper.full.settings.lr, len(run.seen) > carried, report.loss))
    assert sum(was for _, _, was, _ in steps) >= 2 * STEPS_IN_ROW
    strategy = strategy_of(Ranks(), "single")
    plain = prepared(strategy, *meta_model(), OPTIM)
    for batch, factor, was, loss in steps:
        plain.factor = lambda n, rate=factor * (1 + RATIO * was): rate
        assert plain.step(Rows(drawn=batch)).loss == pytest.approx(loss, rel=1e-4)
    with strategy.edit_masters() as shards:
        for name, end in run.masters().items():
            torch.testing.assert_close(end, shards[name].param.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("factor", "made", "ended"),
    [(1.6, 2, "loss"), (math.nan, 2, "loss"), (1.4, STEPS_IN_ROW, ""), (0.5, STEPS_IN_ROW, "")],
)
def test_it_ends_where_a_check_fails(factor, made, ended):
    """The tolerance is half of the check loss before them."""
    run = extrapolating(Ranks(), "single")
    run.until("extrapolate")
    run.heights = [factor * run.cycle.open.before] * 9
    run.until("settle")
    assert (run.cycle.open.extrapolated, run.cycle.open.ended) == (made, ended)
    run.heights = None
    said = run.train(SETTLE)[-1].prediction
    assert (said["extrapolated"], said["kept"], said["ended"]) == (made, made * RATIO, ended or None)


def test_the_last_update_is_checked_however_few_there_are():
    run = extrapolating(Ranks(), "single", guard=EXTRAPOLATING["guard"] | {"correction_interval": 100})
    run.until("extrapolate")
    run.heights = [100.0]
    run.until("settle")
    assert run.cycle.open.ended == "loss" and run.heights == []


def test_a_skipped_step_among_them_takes_no_check_away():
    run = extrapolating(Ranks(), "single", guard=EXTRAPOLATING["guard"] | {"correction_interval": 100})
    run.until("extrapolate")
    skipping(run, 1)
    run.heights = [100.0]
    run.until("settle")
    assert (run.cycle.open.extrapolated, run.cycle.open.ended) == (STEPS_IN_ROW - 1, "loss")


def test_weights_that_went_too_far_end_it():
    run = extrapolating(Ranks(), "single", guard=EXTRAPOLATING["guard"] | {"drift": 1e-6})
    run.until("settle")
    assert (run.cycle.open.extrapolated, run.cycle.open.ended) == (1, "drift")


def test_what_is_learned_from_extrapolation():
    """The next moment knows that the weights moved on by so many steps, the statistics see one longer update, and settle steps
    teach no noise; what was checked before is no check of these weights."""
    run = extrapolating(Ranks(), "single")
    run.until("extrapolate")
    assert run.cycle.base is None
    for _ in range(2):
        run.train(1)
        factor = run.stepper.full.factor(run.stepper.full.steps_done)
        assert run.stepper.controller.action == (factor, RATIO)
        assert (run.stepper.hook.steps, run.stepper.hook.lr) == (1 + RATIO, pytest.approx((1 + RATIO) * factor))
    run.until("settle")
    seen = run.stepper.controller.signals._noise.mean.seen
    run.until("predict")
    assert run.stepper.controller.signals._noise.mean.seen == seen, "settle steps teach no noise"


def skipping(run, steps):
    """The next steps are skipped, as if their gradients were not finite: drawn, nothing applied."""
    full = run.stepper.full
    judge, left = full.spikes.judge, [steps]

    def veto(loss, norm):
        left[0] -= 1
        return "planted" if left[0] >= 0 else judge(loss, norm)

    full.spikes.judge = veto


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_extrapolation_of_which_every_step_is_skipped_is_nothing(mode):
    run, starts = extrapolating(Ranks(), "single", mode=mode), []
    begin, learned = run.cycle.begin_extrapolation, run.stepper.controller.bandit.learned_K.tolist()

    def begun(*arguments):
        found = begin(*arguments)
        if found.tried:
            starts.append(run.bits())
            skipping(run, STEPS_IN_ROW)
        return found

    run.cycle.begin_extrapolation = begun
    run.until("extrapolate")
    run.until("settle")
    assert [run.bits()] == starts and run.seen == []
    said = run.train(SETTLE)[-1].prediction
    assert (said["kept"], said["extrapolated"], said["credited"], said["undone"]) == (0, 0, 0, False)
    assert run.cycle.open is None and run.stepper.controller.bandit.learned_K.tolist() == learned
    assert run.cycle.savings.balance == 0 and run.stepper.ledger.accepted == 0


def test_a_skipped_step_is_not_repeated_and_not_made():
    run = extrapolating(Ranks(), "single", mode="auto")
    run.until("extrapolate")
    run.train(1)
    assert len(run.seen) == 2
    skipping(run, 1)
    run.train(STEPS_IN_ROW - 2)
    assert run.cycle.open.extrapolated == STEPS_IN_ROW - 1 == len(run.seen)
    skipping(run, 1)
    run.heights = [100.0]
    said = run.train(SETTLE)[-1].prediction
    assert said["undone"] and run.cycle.savings.balance == -(STEPS_IN_ROW - 1 + SETTLE - 1), "steps that were made"


def test_a_first_row_is_not_judged_by_a_rate_that_is_not_known():
    run = extrapolating(Ranks(), "single")
    run.until("extrapolate")
    run.until("settle")
    said = run.train(SETTLE)[-1].prediction
    assert math.isnan(said["steps_saved"]) and math.isnan(said["reward"]) and said["credited"] > 0
    assert run.stepper.controller.bandit.learned_K.sum() == 0
    run.until("extrapolate")
    run.until("settle")
    assert math.isfinite(run.train(SETTLE)[-1].prediction["reward"])
    assert run.stepper.controller.bandit.learned_K.sum() == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fit(write(tmp_path_factory.mktemp("extrapolation"), "extrapolating", LAST | IN_RUNS))


@pytest.mark.parametrize("phase", ["extrapolate", "settle"])
def test_a_run_goes_on_from_the_middle_of_it(whole, phase, tmp_path):
    assert rows(whole)[-1]["ledger"]["accepted"] >= 1 and rows(whole)[-1]["ledger"]["predicted"] >= 1
    steps = [step for step, found in phases(whole).items() if found == phase and step < RATIOER]
    cut_back(whole, steps[1], tmp_path)
    again = fit(whole.parent.parent / "extrapolating.yaml", f"runs_dir={tmp_path}")
    assert_same_run(whole, again)


def test_it_is_left_as_it_is_by_a_run_that_observes(whole, tmp_path):
    step = next(step for step, found in phases(whole).items() if found == "extrapolate")
    run = cut_back(whole, step, tmp_path)
    fit(whole.parent.parent / "extrapolating.yaml", f"runs_dir={tmp_path}", "predict.mode=observe", allow=["predict"])
    later = [row for row in rows(run) if row["step"] > step]
    assert "extrapolate" not in {row["prediction"]["phase"] for row in later} and len(rows(run)) == RATIOER + 1
    assert "credited" not in later[0]["prediction"] and not any("extrapolated" in row["prediction"] for row in later)


def test_the_ratio_that_was_learned_with_stays(whole, tmp_path):
    cut_back(whole, 10, tmp_path)
    with pytest.raises(UsageError, match=r"predict\.extrapolation_ratio = 5: .* made for 2 .*--allow-change predict\)"):
        fit(
            whole.parent.parent / "extrapolating.yaml",
            f"runs_dir={tmp_path}",
            "predict.extrapolation_ratio=5",
            allow=["predict"],
        )


@pytest.mark.parametrize(
    "change", [{"coefficients": "world"}, {"every": 2}, {"share": 0.5}], ids=["coefficients", "every", "share"]
)
def test_settings_that_it_cannot_work_with_are_refused(change):
    with pytest.raises(
        ValidationError, match=f"extrapolation_steps = 4: repeats the update just made: needs {next(iter(change))} = .*"
    ):
        PredictConfig(**({"directions": ["optimizer"], "coefficients": "line", "extrapolation_steps": 4} | change))


def test_it_begins_only_where_it_can_be_tested():
    run = Run(Ranks(), "single", **(EXTRAPOLATING | {"extrapolation_steps": STEPS}))
    for _ in range(STEPS):
        run.train(1)
    assert run.stepper.ledger.attempts == 0
