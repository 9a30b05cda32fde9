"""The world model on processes of which the truth is known."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from scale.config.predict import WorldConfig
from scale.predict.features import NAMES
from scale.predict.moments import Moment, StepForecast
from scale.predict.signals import RATE
from scale.predict.world import WorldModel
from tests.predict.planted import Planted, moments

SMALL = WorldConfig(members=3, hidden=16, latent=4, train_every=4, paths=16, bptt=12)
EAGER = SMALL.model_copy(update={"members": 2, "bptt": 8, "train_every": 2})
HORIZON = 25


def judged(world: WorldModel, process: Planted, known: int) -> np.ndarray:
    """Forecasts due after step `known`: error, error of the last value, inside the interval or not. (N, 3)."""
    due: dict[int, tuple[StepForecast, float]] = {}
    rows = []
    for moment in moments(process):
        world.observe(moment)
        assert world.anchor is not None
        now, step = world.anchor.loss, moment.step
        if step in due and step > known:
            forecast, last = due[step]
            inside = forecast.lower_T[-1] <= now <= forecast.upper_T[-1]
            rows.append((abs(forecast.loss_T[-1] - now), abs(last - now), inside))
        if step % 3 == 0 and (forecast := world.forecast([process.lr_factor(step + t) for t in range(1, HORIZON + 1)])):
            due[step + HORIZON] = forecast, now
    return np.array(rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_forecasts_a_loss_whose_rate_the_learning_rate_decides(seed: int) -> None:
    rows = judged(WorldModel(SMALL, seed), Planted(900, seed), known=400)
    error, last, coverage = rows.mean(0)
    assert len(rows) > 150
    assert error < 0.7 * last
    assert 0.80 <= coverage <= 0.97


def regimes(steps: int, seed: int, shuffled: bool) -> list[Moment]:
    """The loss rises or falls for a while; of all there is to see, one feature alone says which comes next."""
    rng = np.random.default_rng(seed)
    rising = np.repeat(rng.choice([-1.0, 1.0], steps // 20 + 1), 20)[:steps]
    features_NF = 0.3 * rng.standard_normal((steps, len(NAMES)))
    features_NF[:, 30] = rising
    if shuffled:
        features_NF = features_NF[rng.permutation(steps)]
    level, baseline, made = 3.0, 3.0, []
    carry = [0.3, 0.8, float("nan"), *[0.5] * 8]
    for step in range(steps):
        level += 0.02 * rising[step]
        loss = level + 0.05 * rng.standard_normal()
        row = features_NF[step].tolist()
        made.append(Moment(step, row, [1.0, 0.0, 0.0], loss, baseline, 0.05, 1.0, 1.0, carry))
        baseline += RATE * (loss - baseline)
    return made


def errors(world: WorldModel, made: list[Moment], known: int, horizon: int = 8) -> tuple[float, float]:
    """Mean error of forecasts made halfway through each regime, and that of the last value."""
    found, due = [], {}
    for moment in made:
        world.observe(moment)
        assert world.anchor is not None
        now, step = world.anchor.loss, moment.step
        if step in due and step > known:
            forecast, last = due[step]
            found.append((abs(forecast.loss_T[-1] - now), abs(last - now)))
        if step % 20 == 4 and (forecast := world.forecast([1.0] * horizon)):
            due[step + horizon] = forecast, now
    error, last = np.mean(found, 0)
    return float(error), float(last)


def test_features_are_what_it_forecasts_from() -> None:
    world = WorldModel(EAGER, 0)
    error, last = errors(world, regimes(800, 0, shuffled=False), 400)
    blind_error, blind_last = errors(WorldModel(EAGER, 0), regimes(800, 0, shuffled=True), 400)
    assert error < 0.65 * last
    assert blind_error > 0.9 * blind_last
    forecast = world.forecast([1.0] * 8)
    assert forecast is not None
    carry_TG = np.array(forecast.carry_TG)
    assert carry_TG.shape == (8, 11) and forecast.divergence < 0.1
    assert np.abs(carry_TG[:, :2] - [0.3, 0.8]).max() < 0.1
    assert carry_TG[:, 10] == pytest.approx(carry_TG[:, :10].mean(1), abs=1e-5)


def test_divergence_is_foreseen_where_it_showed_before() -> None:
    world = WorldModel(EAGER, 0)
    made = regimes(500, 0, shuffled=False)
    for moment in made:
        world.observe(replace(moment, diverged=moment.features_F[30] > 0))
    foreseen = {}
    learned = json.dumps(world.state_dict())
    for sign in (1.0, -1.0):
        world.load_state_dict(json.loads(learned))
        for step in range(12):
            features = [0.0] * len(NAMES)
            features[30] = sign
            world.observe(replace(made[-1], step=1000 - 100 * int(sign) + step, features_F=features))
        forecast = world.forecast([1.0] * 3)
        assert forecast is not None
        foreseen[sign] = forecast
    assert foreseen[1.0].divergence > foreseen[-1.0].divergence + 0.2
    assert foreseen[1.0].confidence < foreseen[-1.0].confidence


def fed(world: WorldModel, made: list[Moment], asking: bool = False) -> WorldModel:
    for moment in made:
        world.observe(moment)
        if asking:
            world.forecast([0.5] * 10)
            world.forecast([0.5] * 10, distance=0.4, jumped=10)
    return world


def test_state_goes_on_bit_for_bit() -> None:
    made = list(moments(Planted(160)))
    config = SMALL.model_copy(update={"replay": 100})
    whole = fed(WorldModel(config, 3), made, asking=True)
    half = fed(WorldModel(config, 3), made[:90], asking=True)
    rest = WorldModel(config, 4)
    rest.seed = 3
    rest.load_state_dict(json.loads(json.dumps(half.state_dict())))
    fed(rest, made[90:], asking=True)
    assert rest.forecast([1.0] * 20) == whole.forecast([1.0] * 20)
    assert json.dumps(rest.state_dict()) == json.dumps(whole.state_dict())
    assert rest.training.updates == 38 and len(rest.replay) == 100


def test_asking_changes_only_the_list_of_forecasts() -> None:
    made = list(moments(Planted(100)))
    silent, asked = fed(WorldModel(SMALL, 0), made), fed(WorldModel(SMALL, 0), made, asking=True)
    one, other = silent.state_dict(), asked.state_dict()
    assert one.pop("calibration") != other.pop("calibration")
    assert json.dumps(one) == json.dumps(other)
    forecast, again = silent.forecast([1.0] * 20), asked.forecast([1.0] * 20)
    assert forecast is not None and again is not None and forecast.loss_T == again.loss_T
    assert asked.forecast([1.0] * 20) == again
    jumped = asked.forecast([1.0] * 20, distance=1.0, jumped=40)
    assert jumped is not None and jumped.loss_T != again.loss_T


def test_no_global_random_number_is_drawn() -> None:
    def states() -> str:
        return str((torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()))

    before = states()
    world = fed(WorldModel(SMALL, 0), list(moments(Planted(70))), asking=True)
    assert world.training.updates > 10
    assert states() == before


def test_nothing_is_foreseen_before_enough_was_learned() -> None:
    world, answers = WorldModel(SMALL, 0), []
    for moment in moments(Planted(60)):
        world.observe(moment)
        answers.append(world.forecast([1.0] * 5) is not None)
    assert answers == [step >= 48 for step in range(1, 61)]  # the tenth update; the first has 12 moments
    assert world.forecast([]) is None


def test_steps_that_failed_do_not_break_it() -> None:
    made = list(moments(Planted(80)))
    made[40] = replace(made[40], loss=float("nan"), grad_norm=float("inf"), diverged=True)
    made[50] = replace(made[50], grad_norm=0.0)
    world = fed(WorldModel(SMALL, 0), made, asking=True)
    forecast = world.forecast([1.0] * 30)
    assert forecast is not None
    assert np.isfinite([*forecast.loss_T, *forecast.lower_T, *forecast.grad_norm_T, forecast.confidence]).all()
    assert all(
        low < mid < high for low, mid, high in zip(forecast.lower_T, forecast.loss_T, forecast.upper_T, strict=True)
    )
