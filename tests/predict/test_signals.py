"""Running statistics of full steps."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from scale.predict.moments import MadeStep
from scale.predict.signals import Signals
from tests.predict.planted import made


def facts(step: int, loss: float, grad_norm: float = 1.0, **changes: bool) -> MadeStep:
    return replace(made(step, loss, grad_norm, 1.0, step / 1000), **changes)


def seen(losses: list[float], sigma: float = 2.5) -> Signals:
    signals = Signals(sigma)
    for step, loss in enumerate(losses):
        signals.update(facts(step, loss))
    return signals


def noisy(n: int = 200, seed: int = 0, noise: float = 0.1, slope: float = 0.0) -> list[float]:
    return (3 + slope * np.arange(n) + noise * np.random.default_rng(seed).standard_normal(n)).tolist()


def test_averages_and_slopes_against_numpy() -> None:
    losses = noisy(slope=-0.01)
    signals = seen(losses)
    for scale in (8, 32, 128):
        value = 0.0
        for n, loss in enumerate(losses, 1):
            rate = max(2 / (scale + 1), 1 / n)
            value = (1 - rate) * value + rate * loss
        assert signals.loss[scale].value == pytest.approx(value, rel=1e-12)
        assert signals.slope(scale) == pytest.approx(np.polyfit(np.arange(scale), losses[-scale:], 1)[0], rel=1e-9)


def test_slopes_and_oscillation_of_a_run_that_outgrows_its_memory() -> None:
    """Every step of 2,500 against a fit of the losses themselves; asking about divergence in between changes nothing."""
    losses, signals = noisy(2500, slope=-0.001), Signals(2.5)
    for n, loss in enumerate(losses):
        signals.divergence(facts(n, 99.0))
        signals.update(facts(n, loss))
        if n < 3 or n % 7:
            continue
        for scale in (8, 32, 128):
            recent = losses[max(n + 1 - scale, 0) : n + 1]
            line = np.polynomial.Polynomial.fit(np.arange(len(recent)), recent, 1).convert()
            assert signals.slope(scale) == pytest.approx(line.coef[1], rel=1e-9, abs=1e-12)
            if scale == 32:
                left = np.array(recent) - line(np.arange(len(recent)))
                assert signals.oscillation == np.mean(np.sign(left[1:]) != np.sign(left[:-1]))
        assert signals.state_dict()["recent"] == losses[max(n - 127, 0) : n + 1]


def test_noise_is_that_of_single_losses_even_under_a_trend() -> None:
    values = [seen(noisy(400, seed, 0.1, slope)).noise for seed in range(20) for slope in (0.0, -0.05)]
    assert 0.09 < np.mean(values) < 0.125  # .1 x sqrt(1 + alpha / (2 - alpha)) = .106


def test_oscillation_of_noise_and_of_a_zigzag() -> None:
    zigzag = [3 - 0.01 * i + 0.5 * (-1) ** i for i in range(100)]
    assert seen(zigzag).oscillation == 1.0
    assert 0.3 < np.mean([seen(noisy(seed=seed)).oscillation for seed in range(20)]) < 0.7
    assert seen([]).oscillation == 0.0


@pytest.mark.parametrize(
    ("loss", "grad_norm", "said"),
    [
        (3.2, 1.0, None),
        (3.4, 1.0, "standard deviations"),
        (2.0, 1.0, None),
        (3.0, 9.0, None),
        (3.0, 11.0, "gradient norm 11 is 11 times"),
        (3.0, 0.009, "gradient norm"),
        (3.0, 0.0, "gradient norm"),
        (math.nan, 1.0, "loss nan"),
        (3.0, math.inf, "gradient norm inf"),
    ],
)
def test_what_counts_as_divergence(loss: float, grad_norm: float, said: str | None) -> None:
    signals = seen([3.0 + 0.1 * (-1) ** (i // 2) for i in range(100)])
    found = signals.divergence(facts(100, loss, grad_norm))
    assert found is None if said is None else found is not None and said in found


def test_sigma_decides_and_settling_steps_are_spared() -> None:
    losses = noisy()
    high = facts(200, 3.0 + 0.1 * 3.5)
    assert seen(losses, 2.2).divergence(high) is not None and seen(losses, 6.0).divergence(high) is None
    assert seen(losses, 2.2).divergence(replace(high, settling=True)) is None
    assert seen(losses, 2.2).divergence(replace(high, settling=True, grad_norm=50.0)) is not None
    assert seen(losses[:10], 2.2).divergence(high) is None


def test_a_prediction_that_failed_and_a_loss_that_swings() -> None:
    calm = seen([3.0 + 0.01 * (-1) ** (i // 2) for i in range(100)])
    assert calm.divergence(facts(100, 3.0), predicted=2.6) is None
    assert "was predicted" in (calm.divergence(facts(100, 3.0), predicted=2.4) or "")
    loud = seen([3.0 + 1.0 * (-1) ** (i // 2) for i in range(100)])
    assert loud.divergence(facts(100, 3.0), predicted=2.4) is None  # off by 20%, but noise is larger
    swinging = seen([3.0 + 0.5 * (-1) ** i for i in range(100)])
    assert "oscillates" in (swinging.divergence(facts(100, 3.5)) or "")


def test_steps_that_failed_leave_the_averages() -> None:
    losses = noisy(50)
    plain, disturbed = seen(losses), seen(losses)
    disturbed.update(facts(50, math.nan))
    disturbed.update(facts(51, 99.0, skipped=True))
    assert disturbed.steps == plain.steps + 2
    assert disturbed.baseline == plain.baseline and disturbed.noise == plain.noise
    disturbed.jumped()
    disturbed.update(facts(52, 9.0, settling=True))
    assert disturbed.since_jump == 1 and disturbed.noise == plain.noise and disturbed.baseline > plain.baseline + 1


def test_state_goes_on_bit_for_bit() -> None:
    losses = noisy(300)
    whole, half, rest = seen(losses), seen(losses[:140]), Signals(2.5)
    rest.load_state_dict(json.loads(json.dumps(half.state_dict())))
    for step, loss in enumerate(losses[140:], 140):
        rest.update(facts(step, loss))
    assert json.dumps(rest.state_dict()) == json.dumps(whole.state_dict())
    assert (rest.baseline, rest.noise, rest.oscillation) == (whole.baseline, whole.noise, whole.oscillation)
