"""What is shown of prediction before training."""

from __future__ import annotations

from typing import Any

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
    facts = shown(horizons=[8, 16], coefficients="line", share=0.5, confidence=0)
    assert facts["prediction"] == "mode auto, preset balanced"
    assert facts["prediction directions"] == "optimizer, masked_slope"
    assert facts["prediction horizons"] == "8, 16 steps, any confidence"
    assert facts["prediction coefficients"] == "line, 0.5 of it"
    assert not any("\n" in line for line in facts.values()) and "selection of documents" not in facts
    assert (
        shown(selection={"kind": "regression", "keep": 0.25})["selection of documents"]
        == "regression, 25% of the candidates kept, after 100 batches (whole windows of rows later)"
    )


def test_what_can_never_happen_in_the_run_is_said() -> None:
    row = {"directions": ["optimizer"], "coefficients": "line", "extrapolation_steps": 8, "warmup": 20, "min_full": 5}
    facts = shown(steps=100, **row)
    assert (
        facts["prediction extrapolation"]
        == "8 full steps, each repeated 3 times, 5 to settle, then one acceptance test"
    )
    assert facts["prediction credit"] == "80% of the steps it saved" and "prediction horizons" not in facts
    assert shown(steps=40, mode="always", **row)["prediction credit"] == "80% of the length"
    late = shown(steps=39, mode="always", **row)["prediction credit"]  # 20 + 5 + 8 + 5 + 1
    assert late == "none: the first jump that can be tested needs more than 39 of 39 steps"
    assert shown(steps=44, **row)["prediction credit"].startswith("none"), "the first decision measures the rate alone"
    assert "prediction extrapolation" not in shown(mode="observe", **row)
    assert "prediction credit" not in shown(mode="observe") and "prediction extrapolation" not in shown()
    chosen = shown(steps=60, selection={"kind": "regression"})["selection of documents"]
    assert chosen.endswith("after 100 batches (never: the run is shorter)")


def test_memory_by_purpose() -> None:
    line = "32.0 MiB (statistics 8.0, carry 8.0, optimizer 4.0, snapshot 4.0, landing 4.0, working 4.0)"
    assert shown(directions=["optimizer"])["memory prediction (for one device)"] == line


def test_a_run_shows_what_its_stepper_keeps(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run(tmp_path, predict={"enabled": True})))
    trainer = build_trainer(load_config(str(path)))
    total = sum(trainer.stepper.memory.values())
    assert trainer.recorder.facts["memory prediction (for one device)"].startswith(f"{total / MIB:,.1f} MiB")
