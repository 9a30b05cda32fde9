"""When a jump is tried at all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from scale.config.predict import PredictConfig
from scale.predict.controller import Controller, Decision
from scale.predict.kinds import KINDS
from scale.predict.moments import StepForecast
from tests.predict.planted import made as made_step

LITTLE = {"members": 1, "hidden": 4, "latent": 2, "train_every": 1000, "paths": 2, "bptt": 4}


def facts(step, loss):
    return made_step(step, loss, 1.0, 1.0, step / 100, 512, 32)


def controller(losses=40, forecast_confidence=0.7, **config):
    """A controller that has seen calm full steps, and whose world model forecasts what is asked."""
    deciding = Controller(PredictConfig(**({"enabled": True, "mode": "always", "directions": ["optimizer"], "horizons": [4],
                                   "min_full": 3, "confidence": 0.6, "world": LITTLE} | config)))  # fmt: skip
    for step in range(1, losses + 1):
        deciding.observe(facts(step, 5.0 - 0.01 * step + 0.02 * math.sin(7 * step)), None, None)
    carry = [[0.5] * len(KINDS)] * 5
    loss = [4.0, 3.9, 3.8, 3.7, 3.6]
    forecast_T = StepForecast(loss, loss, loss, [1.0] * 5, carry, 0.0, forecast_confidence)
    deciding.asked = []

    def forecast(factors, share=0.0, jumped=0):
        """A jump lowers the loss by 0.03 for each of its steps."""
        deciding.asked.append((list(factors), share, jumped))
        down = [deciding.world.anchor.loss - 0.03 * jumped] * len(factors)
        return replace(forecast_T, loss_T=down) if jumped else forecast_T

    deciding.world.forecast = forecast
    return deciding


def decide(made, step=40):
    return made.decide(step, 100, [1.0] * 4, ["optimizer"], None, [])


def test_confident_enough_is_a_jump():
    said = decide(controller())["go"]
    assert [said[key] for key in ("direction", "horizon", "confidence")] == ["optimizer", 4, 0.7]
    assert said["reach_KG"][3] == pytest.approx([2.0] * len(KINDS))  # half of four lines


def test_what_a_jump_will_bring_is_imagined_with_the_jump_in_it():
    """Of the length that was chosen, of the mean share of the line, and the settle steps after it; the context takes the
    longest one."""
    made = controller(horizons=[2, 4], guard={"settle_steps": 3})
    made.bandit.choose = lambda context, arms, stay: (2, "optimizer")
    said = decide(made)["go"]
    assert said["gain"] == pytest.approx(0.03 * 2) and said["expected"] == pytest.approx(0.03 * 2)
    assert made.asked == [([1.0] * 4, 0.0, 0), ([1.0] * 3, 0.5, 4), ([1.0] * 3, 0.5, 2)]
    assert said["context"][-1] == pytest.approx(min(1.0, 0.03 * 4 / made.signals.noise))


def test_a_jump_is_imagined_as_jumps_are_learned():
    """Below the peak learning rate and with other steps behind it, what is asked is what is taught once it was made."""
    made = controller(horizons=[3], guard={"settle_steps": 5})
    made.world.forecast([1.0])
    factors = [0.4, 0.3, 0.2, 0.2, 0.2]
    said = made.decide(40, 100, factors, ["optimizer"], None, [])["go"]
    made.jumped(3, Decision(**said).distance(3))
    asked = made.asked[-1]
    assert asked[0] == factors and asked[1:] == made.action == (pytest.approx(0.5 * 0.3), 3)


@pytest.mark.parametrize("confidence", [0.59, 0.0, math.nan])
def test_less_confidence_is_none(confidence):
    said = decide(controller(forecast_confidence=confidence))
    assert said["stay"].startswith("confidence") and "soon" not in said
    assert said["confidence"] == pytest.approx(confidence, nan_ok=True)


def test_after_a_sign_of_divergence_min_full_calm_steps_come_first():
    made = controller()
    assert made.observe(facts(41, 50.0), None, None) is not None
    for step in (42, 43):
        assert decide(made, step) == {"stay": "divergence", "soon": True}
        made.observe(facts(step, 4.6), None, None)
    assert made.calm == 2
    made.observe(facts(44, 4.6), None, None)
    assert "go" in decide(made, 44)


def test_a_loss_far_from_the_forecast_one_is_a_sign_of_divergence():
    made = controller(forecast_confidence=0.1)
    assert "stay" in decide(made)  # it has forecast 4.0
    assert "was predicted" in made.observe(facts(41, 2.0), None, None)
    calm = controller()
    assert calm.observe(facts(41, 4.6), None, None) is None


def test_what_was_missed_before_corrects_what_is_expected():
    made = controller()
    first = decide(made)["go"]
    assert first["expected"] == pytest.approx(first["gain"])
    made.residuals.add(40, first["features_F"], first["gain"], first["gain"] - 0.4)
    second = decide(made)["go"]
    assert second["gain"] == first["gain"] and second["expected"] == pytest.approx(first["gain"] - 0.4, abs=0.02)
    assert second["context"][-1] < first["context"][-1]


def test_no_kind_is_moved_further_than_one_and_a_half_straight_lines():
    made = controller()
    forecast = made.world.forecast
    far = [[3.0, -1.0, *[0.5] * (len(KINDS) - 2)]] * 5
    made.world.forecast = lambda *asked: replace(forecast(*asked), carry_TG=far)
    reach_G = decide(made)["go"]["reach_KG"][3]
    assert reach_G[:3] == pytest.approx([4 * 1.5, 0.0, 4 * 0.5])


@pytest.mark.parametrize(("device", "there"), [("cpu", "cpu"), ("training", "meta")])
def test_the_world_model_lives_where_it_is_asked_to(device, there):
    config = PredictConfig(enabled=True, world=LITTLE | {"device": device})
    assert {p.device.type for p in Controller(config, "meta").world.model.parameters()} == {there}
