"""SIGKILL at random moments of a predictive run: the continued run writes the very metrics of an uninterrupted one."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import yaml

from scale.monitor.records import read_rows
from tests.conftest import tiny_run
from tests.predict.runs import LAST, WORLD, assert_same_run, phases, rows
from tests.resume.test_kill import finish, kill_once, start

KILLS, DURING_SAVE = 12, 3
STEPS = 110


def config(folder: Path, predict: dict[str, object]) -> Path:
    run = tiny_run(
        folder,
        train={"steps": STEPS},
        checkpoint={"every": 2, "keep_last": 2, "keep_best": 1},
        eval={"every": 8, "tokens": 512},
        optim={"lr": 1e-4},
        predict=predict,
    )
    run["data"] |= {"workers": 2}
    # wide enough that writing takes a while, and with random numbers in every forward pass
    run["model"]["overrides"] |= {"hidden_size": 128, "intermediate_size": 256, "attention_dropout": 0.1}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def phase(folder: Path) -> str:
    """Which phase the run was in when it died."""
    said = read_rows(folder / "metrics.jsonl")
    return str(said[-1]["prediction"]["phase"]) if said and said[-1]["prediction"] else "none"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("settings", ["last", "world"])
def test_kills_leave_no_trace_in_a_predictive_run(settings: str, tmp_path: Path) -> None:
    path = config(tmp_path, {"last": LAST, "world": WORLD}[settings])
    finish(start(path, "whole"))
    whole, folder = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    ledger = rows(whole)[-1]["ledger"]
    assert ledger["accepted"] >= 2 and ledger["predicted"] >= 2, json.dumps(ledger)
    rng, during_save, met = random.Random(0), 0, Counter[str]()
    for kill in range(KILLS):
        during_save += kill_once(path, folder, during_save=kill % 2 == 0, rng=rng)
        met[phase(folder)] += 1
    print(f"{KILLS} kills, {during_save} of them during a save, in {dict(met)}")
    assert during_save >= DURING_SAVE, f"only {during_save} kills hit a save"
    assert len(rows(folder)) < STEPS, "the run was over before the last kill"
    finish(start(path, "killed"))
    assert_same_run(whole, folder)
    assert set(phases(whole).values()) == {"warmup", "full", "settle", "predict"}
