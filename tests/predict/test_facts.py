"""What is shown of prediction before training."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from scale.build import build_trainer
from scale.config import load_config
from scale.config.predict import PredictConfig
from scale.predict.facts import predict_facts
from tests.conftest import tiny_run

MIB = 2**20


def shown(steps: int = 1000, **config: Any) -> dict[str, str]:
    return predict_facts(PredictConfig.model_validate({"enabled": True} | config), MIB, steps)


def test_nothing_where_prediction_is_off() -> None:
    assert predict_facts(PredictConfig(), MIB, 1000) == {}


def test_one_line_each() -> None:
    facts = shown(directions=["drift", "optimizer"], horizons=[8, 16], coefficients="fixed", fixed=0.5, confidence=0)
    assert facts["prediction"] == "mode auto, use adopt, preset balanced, costs flops"
    assert facts["prediction directions"] == "drift, optimizer"
    assert facts["prediction horizons"] == "8, 16 steps, any confidence"
    assert facts["prediction coefficients"] == "fixed 0.5"
    assert not any("\n" in line for line in facts.values()) and "selection of documents" not in facts
    assert (
        shown(selection={"kind": "world", "keep": 0.25})["selection of documents"]
        == "world, 25% of the candidates kept, after 100 batches (whole windows of rows later)"
    )
    chosen = {"kind": "history", "control": "bandit", "shares": [0.25], "episode": 30}
    said = shown(selection=chosen, use="shadow", stop_below=2.5)
    assert said["selection of documents"] == (
        "history, 50%, 25%, 100% of the candidates, chosen in episodes of 30 steps, after 100 batches (whole windows of "
        "rows later)"
    )
    assert said["prediction ends the run"] == "once the weights beside it have a check loss of 2.5 or less"


def test_what_can_never_happen_in_the_run_is_said() -> None:
    striding = {"directions": ["optimizer"], "coefficients": "last", "strides": 8, "warmup": 20, "min_full": 5}
    said = shown(steps=100, **striding)
    assert said["prediction strides"] == "8 full steps carried on, 5 to relax, then one verdict"
    assert said["prediction credit"] == "80% of the measured worth"
    assert shown(steps=40, mode="always", **striding)["prediction credit"] == "80% of the length"
    late = shown(steps=39, **striding)["prediction credit"]  # 20 + 5 + 8 + 5 + 1
    assert late == "none: the first jump that can be judged needs more than 39 of 39 steps"
    assert "prediction credit" not in shown(mode="observe") and "prediction strides" not in shown()
    chosen = shown(steps=60, selection={"kind": "world"})["selection of documents"]
    assert chosen.endswith("after 100 batches (never: the run is shorter)")


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {},
            "32.0 MiB (looks 8.0, carry 8.0, optimizer 4.0, snapshot 4.0, landing 4.0, working 4.0)",
        ),
        (
            {"guard": {"offload": True}},
            "24.0 MiB (looks 8.0, carry 8.0, optimizer 4.0, working 4.0; jump, in CPU memory 8.0)",
        ),
        (
            {"use": "shadow", "guard": {"offload": True}},
            "28.0 MiB (looks 8.0, carry 8.0, optimizer 4.0, shadow 4.0, working 4.0; jump, in CPU memory 4.0)",
        ),
    ],
)
def test_memory_by_purpose(config: dict[str, Any], line: str) -> None:
    assert shown(directions=["optimizer"], **config)["memory prediction (for one device)"] == line


def test_a_run_shows_what_its_stepper_keeps(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run(tmp_path, predict={"enabled": True})))
    trainer = build_trainer(load_config(str(path)))
    total = sum(trainer.stepper.memory.values())
    assert trainer.recorder.facts["memory prediction (for one device)"].startswith(f"{total / MIB:,.1f} MiB")
