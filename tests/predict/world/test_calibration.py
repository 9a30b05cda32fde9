"""Intervals that keep their promise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from scale.predict.signals import RATE
from scale.predict.world.calibration import Calibration, confidence
from scale.predict.world.imagine import Anchor, smoothed
from scale.predict.world.rssm import Gaussian


def score(calibration: Calibration, distances: list[float]) -> list[bool]:
    """One-step forecasts of 0 within +-1, one after the other, and what came."""
    inside = []
    for n, distance in enumerate(distances):
        calibration.register(n, False, 0.5, [0.0], [-1.0], [1.0])
        inside.append(abs(distance) <= calibration.widening)
        calibration.observe(n + 1, distance, jumped=False)
    return inside


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_coverage_comes_to_ninety_percent_whatever_the_width(scale: float) -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration()
    inside = score(calibration, (scale * rng.standard_normal(1000)).tolist())
    assert 0.87 < np.mean(inside[100:]) < 0.93
    assert calibration.widening == pytest.approx(1.645 * scale, rel=0.25)


def test_coverage_follows_a_process_that_changes() -> None:
    rng, calibration = np.random.default_rng(1), Calibration()
    spread = np.where(np.arange(1500) // 250 % 2, 2.0, 0.7)
    inside = score(calibration, (spread * rng.standard_normal(1500)).tolist())
    assert 0.85 < np.mean(inside[100:]) < 0.94


def test_scores_by_hand() -> None:
    calibration = Calibration()
    assert calibration.widening == 2.0
    calibration.register(10, False, 3.0, [2.9, 2.8, 2.7, 2.6], [2.8] * 2 + [2.6, 2.4], [3.0] * 4)
    assert [p.due for p in calibration.pending] == [11, 12, 14]
    calibration.register(10, False, 3.0, [2.9] * 4, [2.8] * 4, [3.1] * 4)  # asked again: replaces
    assert len(calibration.pending) == 3
    calibration.observe(11, 3.0, jumped=False)
    (found,) = calibration.scores
    assert found.distance == pytest.approx(0.5) and found.inside  # upper side: .1 of .2
    assert found.error == pytest.approx(0.1) and found.last_error == 0.0
    assert calibration.level == pytest.approx(0.1 + 0.01 * 0.1)
    assert calibration.widening == pytest.approx(0.05 * 0.5 + 0.95 * 2.0)
    calibration.observe(12, 2.5, jumped=False)
    assert calibration.scores[-1].distance == pytest.approx(4.0) and not calibration.scores[-1].inside
    assert calibration.level == pytest.approx(0.101 - 0.01 * 0.9)
    report = calibration.report()
    assert report["coverage"] == 0.5 and report["error"] == pytest.approx(0.25)
    assert report["last_value_error"] == pytest.approx(0.25) and report["scored"] == 2
    calibration.observe(13, float("nan"), jumped=False)
    calibration.observe(14, float("nan"), jumped=False)
    assert calibration.scored == 2 and not calibration.pending


def test_a_jump_voids_what_did_not_count_on_it() -> None:
    calibration = Calibration()
    for made, jump in ((5, False), (6, False), (6, True)):
        calibration.register(made, jump, 0.0, [0.0] * 8, [-1.0] * 8, [1.0] * 8)
        if made == 5:
            calibration.observe(6, 0.0, jumped=False)
    calm = Calibration()
    calm.load_state_dict(json.loads(json.dumps(calibration.state_dict())))
    assert calm.state_dict() == calibration.state_dict()
    calibration.observe(7, 0.0, jumped=True)
    assert {(p.made, p.jump) for p in calibration.pending} == {(6, True)}
    calm.observe(7, 0.0, jumped=False)
    assert {(p.made, p.jump) for p in calm.pending} == {(5, False), (6, False)}
    calibration.observe(8, 0.0, jumped=False)
    assert {(p.made, p.jump) for p in calibration.pending} == {(6, True)}


def test_nothing_is_claimed_before_anything_was_scored() -> None:
    report = Calibration().report()
    assert [report[name] for name in ("coverage", "error", "last_value_error")] == [None] * 3 and report["scored"] == 0


def test_confidence_by_hand() -> None:
    assert confidence(0.0, 0.1, 0.0) == 1.0
    assert confidence(2 * 1.645 * 0.1, 0.1, 0.0) == pytest.approx(0.8)
    assert confidence(4 * 1.645 * 0.1, 0.1, 0.25) == pytest.approx(0.375)


def test_noise_of_smoothed_futures_is_that_of_an_average_of_real_losses() -> None:
    steps, paths, std, noise = 40, 4000, 0.7, 0.5
    y = Gaussian(torch.full((steps, 1, paths), -0.2), torch.full((steps, 1, paths), std))
    eps = torch.randn(steps, 1, paths, generator=torch.Generator().manual_seed(0))
    mean, sampled = smoothed(y, Anchor(3.0, noise, 0.0), eps)
    assert torch.allclose(mean[:, 0, 0], 3.0 - 0.2 * noise * RATE * torch.arange(1, steps + 1))
    average, baselines = np.zeros(paths), []  # losses around a level that is known
    for losses in noise * std * np.random.default_rng(0).standard_normal((steps, paths)):
        average += RATE * (losses - average)
        baselines.append(average.std())
    spread = (sampled - mean)[:, 0].std(-1).numpy()
    assert spread == pytest.approx(np.array(baselines), rel=0.06)
