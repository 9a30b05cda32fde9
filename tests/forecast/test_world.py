"""The world model over coarse steps: its moments by hand, a straight line continued, its own random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scale.errors import UsageError
from scale.forecast.curve import Curve
from scale.forecast.methods import world_model
from scale.forecast.world import PACE, SMOOTH, CoarseCurve, WorldModelForecast
from scale.predict.signals import RATE
from tests.forecast.synthetic import factors


def falling(known: int, steps: int = 1000) -> Curve:
    """A run at constant learning rate whose loss is 8 step^-0.25, with 3% noise."""
    lr_T, warmup = factors(steps, kind="constant")
    step_T = np.arange(1, steps + 1)
    loss_T = 8 * step_T**-0.25 * np.exp(0.03 * np.random.default_rng(0).standard_normal(steps))
    return Curve(step_T, loss_T, lr_T, warmup).until(known)


def test_moments_by_hand() -> None:
    curve = falling(500)
    coarse = CoarseCurve(curve)
    np.testing.assert_allclose(np.diff(np.log(coarse.step_J)), PACE)
    reach = np.exp(-PACE * SMOOTH)
    inside = (curve.step_N > 500 * reach) & (curve.step_N <= 500)
    assert coarse.loss_J[-1] == pytest.approx(np.log(curve.loss_N[inside]).mean(), rel=1e-12)
    assert coarse.step_J[-1] == pytest.approx(500 * reach**0.5)
    moments = coarse.moments()
    for moment, after in zip(moments, coarse.loss_J[1:], strict=True):
        assert moment.baseline + RATE * (moment.loss - moment.baseline) == pytest.approx(after, abs=1e-9)
    assert coarse.ahead()[-2] < 1000 <= coarse.ahead()[-1]


def test_features_know_nothing_of_the_change_that_they_foretell() -> None:
    curve = falling(500)
    last = CoarseCurve(curve).moments()[-1]
    other = CoarseCurve(Curve(curve.step_N, np.append(curve.loss_N[:-1], 9.0), curve.lr_T, curve.warmup)).moments()[-1]
    assert other.loss > last.loss + 0.05 and other.noise != last.noise
    changes, other_changes = (np.array(moment.features_F[:3]) * moment.noise for moment in (last, other))
    np.testing.assert_allclose(other_changes, changes, rtol=1e-9)  # only the unit moved
    assert other.features_F[3:] == last.features_F[3:]


def test_an_even_fall_goes_on() -> None:
    forecast = WorldModelForecast(falling(400), 0)
    said = np.exp(forecast.log_loss(np.array([1000.0])))[0]
    assert said == pytest.approx(8 * 1000**-0.25, rel=0.06)
    assert said < 0.9 * 8 * 400**-0.25
    assert forecast.spread(np.array([1000.0]))[0] > forecast.spread(np.array([450.0]))[0] > 0
    assert 0 < forecast.error < 0.03


def test_own_random_numbers_and_the_same_twice() -> None:
    before = torch.get_rng_state()
    first = WorldModelForecast(falling(300), 0).log_loss(np.array([1000.0]))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    assert WorldModelForecast(falling(300), 0).log_loss(np.array([1000.0])) == first


def test_too_short_and_what_it_says_of_learning_rates_ahead() -> None:
    with pytest.raises(UsageError, match="coarse moments"):
        WorldModelForecast(falling(160), 0)
    assert "have" not in world_model(falling(300), 0).note
    lr_T, warmup = factors(1000, kind="linear")
    known = falling(300)
    decaying = Curve(known.step_N, known.loss_N, lr_T, warmup)
    assert "this run has not had yet" in world_model(decaying, 0).note
