"""`predict.stop_below`: a run ends once the predicted weights beside it are good enough."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scale.api import load_run
from scale.build import build_trainer
from scale.cli.main import main
from scale.config import load_config
from scale.parallel.ranks import Ranks
from tests.distributed.harness import run_ranks
from tests.predict.runs import LAST, STEPS, fit, last, rows, same_bits, tensors, write

SHADOW = LAST | {"use": "shadow"}


class Dropping:
    """The backward stepper, but one group of the stream is drawn and thrown away before step `at`."""

    def __init__(self, full, at):
        self.full, self.at = full, at

    def step(self, source):
        if self.full.steps_done + 1 == self.at:
            source.draw()
        return self.full.step(source)

    def __getattr__(self, name):
        return getattr(self.full, name)


def offers(run):
    """(step, check loss) of the weights that were kept."""
    said = [(row["step"], (row["prediction"] or {}).get("shadow")) for row in rows(run)]
    return [(step, loss) for step, loss in said if loss is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stop")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return fit(write(folder, "whole", SHADOW))


@pytest.fixture(scope="module")
def goal(whole: Path) -> tuple[int, float]:
    """The second offer of the whole run."""
    return offers(whole)[1]


@pytest.fixture(scope="module")
def ended(folder: Path, goal: tuple[int, float]) -> Path:
    path = write(folder, "ended", SHADOW | {"stop_below": goal[1]})
    trainer = build_trainer(load_config(str(path)))
    assert trainer.fit() == "early stop"
    return trainer.folder.path


def test_it_ends_at_the_step_of_the_first_weights_that_are_good_enough(whole, ended, goal):
    said, step = rows(ended), goal[0]
    assert 1 < step < STEPS and said[:-1] == rows(whole)[:step] and said[-1]["step"] == step == last(ended).step
    assert said[-1]["prediction"]["stop"].endswith(f"<= predict.stop_below = {goal[1]:g}")
    assert all("stop" not in (row["prediction"] or {}) for row in said[:-1])
    state = json.loads((ended / "run_state.json").read_text())
    assert state["status"] == "completed"
    assert f"the run ends after step {step}" in next(e["text"] for e in state["events"] if e["kind"] == "early_stop")


def test_training_is_that_of_a_run_without_a_predictor(folder, ended):
    """But for the check batch, which both take out of the stream."""
    drawn = next(row["step"] for row in rows(ended)[1:] if row["ledger"]["check_forwards"])
    path = write(folder, "plain")
    trainer = build_trainer(load_config(str(path)), around=lambda full: Dropping(full, drawn))
    trainer.loop.save = lambda step, loss: trainer._save(step, loss) if step <= last(ended).step else None
    assert trainer.fit() == "completed"
    assert last(trainer.folder.path).step == last(ended).step
    for kind in ("model/", "optim/"):
        assert same_bits(tensors(trainer.folder.path, kind), tensors(ended, kind))


def test_the_shadow_is_exported_and_has_the_loss_that_was_asked_for(ended, goal, tmp_path):
    assert main(["export", str(ended), "--shadow", "--out", str(tmp_path / "out")]) == 0
    assert last(ended).state()["stepper"]["predict"]["attempts"]["shadow"]["loss"] == goal[1]
    assert load_run(ended, shadow=True)


def test_the_same_command_says_so_and_does_not_go_on(folder, ended, goal):
    before = rows(ended)
    found = subprocess.run(
        [sys.executable, "-m", "scale.cli.main", "train", str(folder / "ended.yaml")],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert f"the run ends after step {goal[0]}" in found.stdout
    assert f"early stop: step {goal[0]} of {STEPS}" in found.stdout
    assert rows(ended) == before


def test_asked_for_more_it_goes_on_as_if_it_had_not_stopped(whole, ended, goal):
    fit(ended.parent.parent / "ended.yaml", "predict.stop_below=1e-6", allow=["predict.stop_below"])
    said, expected = rows(ended), rows(whole)
    assert said[goal[0]]["prediction"].pop("stop") and said == expected
    assert last(ended).step == STEPS


def stops(ranks: Ranks, path: str) -> list[object]:
    """For `run_ranks`."""
    trainer = build_trainer(load_config(path, ["compute.strategy=fsdp"]), ranks=ranks)
    return [trainer.fit(), trainer.loop.done]


def test_two_processes_end_at_the_same_step(tmp_path, goal):
    path = write(tmp_path, "two", SHADOW | {"stop_below": goal[1] + 0.02}, batch={"sequences": 8, "micro": 2})
    first, second = run_ranks("tests.predict.test_stop:stops", path=str(path))
    assert first == second and first[0] == "early stop" and first[1] < STEPS
    assert "stop" in rows(tmp_path / "runs" / "two")[-1]["prediction"]
