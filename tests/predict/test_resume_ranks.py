"""A predictive run of two processes dies while a jump is open, or while its steps are counted: it goes on bit for bit, and
one process goes on where two stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from scale.parallel.ranks import Ranks
from tests.distributed.harness import run_ranks
from tests.predict.runs import LAST, STEPS, assert_same_run, cut_back, fit, phases, rows, write

PHASES = ["settle", "predict"]
OVERRIDES = {
    "fsdp": ["compute.strategy=fsdp"],
    "zero2": ["compute.strategy=deepspeed", "compute.deepspeed.stage=2"],
    "zero3": ["compute.strategy=deepspeed", "compute.deepspeed.stage=3"],
}


def where(run: Path, phase: str) -> int:
    """The first step after which the run was in a phase."""
    return next(step for step, found in phases(run).items() if found == phase)


def died_and_went_on(ranks: Ranks, path: str, overrides: list[str]) -> None:
    """A whole run, and one that goes on from each of the phases."""
    run = fit(Path(path), *overrides, ranks=ranks)
    for phase in PHASES:
        again = run.parent.parent / phase
        ranks.lead(lambda again=again, phase=phase: str(cut_back(run, where(run, phase), again)))
        fit(Path(path), *overrides, f"runs_dir={again}", ranks=ranks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OVERRIDES)
def test_two_processes_go_on_bit_for_bit_and_one_goes_on_for_them(kind, tmp_path):
    path = write(tmp_path, "whole", LAST, batch={"sequences": 8, "micro": 2})
    target = "tests.predict.test_resume_ranks:died_and_went_on"
    run_ranks(target, timeout=550, path=str(path), overrides=OVERRIDES[kind])
    whole = tmp_path / "runs" / "whole"
    assert rows(whole)[-1]["ledger"]["accepted"] >= 2
    for phase in PHASES:
        assert_same_run(whole, tmp_path / phase / "whole")
    step = where(whole, "settle")
    alone = cut_back(whole, step, tmp_path / "alone")
    fit(path, f"runs_dir={tmp_path / 'alone'}")
    said, expected = rows(alone), rows(whole)
    assert said[: step + 1] == expected[: step + 1] and len(said) == STEPS + 1
    judged = next(row for row in said[step:] if "credited" in row["prediction"])
    verdict = expected[judged["step"]]["prediction"]
    assert judged["prediction"]["check_settled"] == pytest.approx(verdict["check_settled"], rel=1e-2)  # other dropout
    assert judged["prediction"]["undone"] == verdict["undone"]
