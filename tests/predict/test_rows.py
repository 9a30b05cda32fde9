"""What metrics.jsonl says of a run that jumped."""

from __future__ import annotations

from itertools import pairwise

import pytest

from scale.config.optim import ScheduleConfig
from scale.train.schedule import lr_factor
from tests.predict.runs import STEPS, rows

COUNTERS = ("tokens", "backward_passes", "backward_tokens")


@pytest.fixture(scope="module")
def said(jumping):
    return rows(jumping)


def test_every_step_has_a_row_and_the_last_one_is_real(said):
    assert [row["step"] for row in said] == list(range(STEPS + 1))
    assert said[-1]["phase"] != "predict" and said[-1]["loss"] is not None
    ledger = said[-1]["ledger"]
    assert ledger["accepted"] >= 2 and ledger["predicted"] >= 3
    assert ledger["full"] + ledger["predicted"] + ledger["skipped"] == STEPS
    assert "seconds" not in ledger, "rows must not depend on the clock"


def test_predicted_rows_never_pass_for_measured_ones(said):
    predicted = [row for row in said if row["was_predicted"]]
    assert len(predicted) == said[-1]["ledger"]["predicted"]
    for row in predicted:
        assert row["phase"] == "predict"
        measured = ("loss", "gradient_norm", "perplexity", "train_val_gap", "layer_gradients", "sources", "skipped")
        assert [row[name] for name in measured] == [None] * len(measured)
    for row in said[1:]:
        if not row["was_predicted"]:
            assert row["loss"] is not None and row["gradient_norm"] is not None and row["predicted_loss"] is None


def test_tokens_and_backward_passes_stand_still_while_the_schedule_moves_on(said):
    for before, row in pairwise(said):
        moved = [row[name] - before[name] for name in COUNTERS]
        assert moved == [0, 0, 0] if row["was_predicted"] else min(moved) > 0
    rates = [row["learning_rate"] for row in said[1:]]
    assert len(set(rates[4:])) == len(rates[4:]), "the learning rate stood still"
    assert rates == pytest.approx([3e-4 * lr_factor(ScheduleConfig(), step, STEPS) for step in range(1, STEPS + 1)])


def test_forward_passes_are_those_of_steps_and_checks(said):
    for before, row in pairwise(said[1:]):
        checks = row["ledger"]["check_forwards"] - before["ledger"]["check_forwards"]
        steps = 0 if row["was_predicted"] else 1
        assert row["forward_passes"] - before["forward_passes"] == steps + checks
        tokens = row["ledger"]["check_tokens"] - before["ledger"]["check_tokens"]
        assert row["forward_tokens"] - before["forward_tokens"] == row["tokens"] - before["tokens"] + tokens
    assert said[-1]["ledger"]["check_forwards"] >= 3 * said[-1]["ledger"]["attempts"]


def test_jumps_tell_what_became_of_them(said):
    told = [row["prediction"] for row in said if row["prediction"] and row["prediction"].get("kept")]
    tested = [row["prediction"] for row in said if row["prediction"] and "credited" in row["prediction"]]
    assert len(told) == len(tested) == said[-1]["ledger"]["attempts"]
    for jump, test in zip(told, tested, strict=True):
        assert jump["check_after"] < jump["check_before"] and 0 <= test["credited"] <= jump["kept"]
