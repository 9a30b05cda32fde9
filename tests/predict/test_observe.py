"""Observing changes nothing: a run without prediction, one with it switched off and one that observes, bit for bit."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.distributed.harness import run_ranks
from tests.predict.runs import LITTLE, OBSERVE, fit, rows, same_bits, state, tensors, write

OFF = OBSERVE | {"enabled": False, "mode": "auto"}
FEWER = {"train": {"steps": 12}, "eval": {"every": 4, "tokens": 512}, "checkpoint": {"every": 6}}


def three(folder):
    """Configs of a run without the section, with it switched off, and with a predictor that observes."""
    paths = [write(folder, "plain"), write(folder, "off", OFF), write(folder, "observe", OBSERVE)]
    for path in paths:
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | FEWER))
    return paths


def check(folder):
    """Rows, states (random generators, place in the data) and tensors of the three runs."""
    plain, off, observe = (folder / "runs" / name for name in ("plain", "off", "observe"))
    said = [rows(run) for run in (plain, off, observe)]
    assert len(said[0]) == 13 and said[0] == said[1]
    assert all(row["prediction"] is None and row["ledger"] is None for row in said[0])
    for row, other in zip(said[0], said[2], strict=True):
        own = {"prediction", "ledger"}
        assert {k: v for k, v in row.items() if k not in own} == {k: v for k, v in other.items() if k not in own}
    assert said[2][-1]["ledger"]["full"] == 12 and said[2][-1]["ledger"]["attempts"] == 0
    states = [state(run) for run in (plain, off, observe)]
    world = states[2]["stepper"].pop("predict")["controller"]["world"]
    assert world != {}, "the world model heard nothing"
    assert json.dumps(states[0]) == json.dumps(states[1]) == json.dumps(states[2])
    trained = [tensors(run) for run in (plain, off, observe)]
    beside = {name for name in trained[2] if name.startswith("predict/")}
    assert any("/smoothed.mean/" in name.replace("predict/", "/") for name in beside)
    for name in beside:
        trained[2].pop(name)
    assert same_bits(trained[0], trained[1]) and same_bits(trained[0], trained[2])
    assert {name.split("/")[0] for name in trained[0]} == {"model", "optim"}


def test_one_process(tmp_path):
    for path in three(tmp_path):
        fit(path)
    check(tmp_path)
    dropout = write(tmp_path, "dry")
    content = yaml.safe_load(dropout.read_text()) | FEWER
    del content["model"]["overrides"]["attention_dropout"]
    dropout.write_text(yaml.safe_dump(content | {"train": {"steps": 1}}))
    first = rows(fit(dropout))[1]["loss"]
    assert first != rows(tmp_path / "runs" / "plain")[1]["loss"], "the passes draw no random numbers: nothing is shown"
    assert LITTLE["train_every"] < 12


SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    "overrides",
    [
        ["compute.strategy=fsdp"],
        pytest.param(["compute.strategy=deepspeed", "compute.deepspeed.stage=2"], **SLOW),
        pytest.param(["compute.strategy=deepspeed", "compute.deepspeed.stage=3"], **SLOW),
    ],
    ids=["fsdp", "zero2", "zero3"],
)
def test_two_processes(overrides, tmp_path):
    paths = [str(path) for path in three(tmp_path)]
    run_ranks("tests.predict.runs:fit_all", timeout=500, paths=paths, overrides=overrides)
    check(tmp_path)
