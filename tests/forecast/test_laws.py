"""The laws against their formulas summed by hand, their derivatives, and parameters found again."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from scale.errors import UsageError
from scale.forecast.curve import LEAST, Curve, curve_of
from scale.forecast.law import fit
from scale.forecast.methods import last_value, multi_power_law, power_law
from scale.forecast.multi_power_law import MultiPowerLaw
from scale.forecast.power_law import PowerLaw
from tests.forecast.synthetic import LAW, curve, factors, fast_law, summed_law


def theta_of(law: MultiPowerLaw, paper: dict[str, float]) -> np.ndarray:
    height = paper["A"] * law.unit_sum ** -paper["alpha"]
    logs = [paper["L0"], height, paper["alpha"], paper["B"], paper["C"], paper["beta"]]
    return np.array([*np.log(logs), paper["gamma"]])


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear", "constant"])
def test_multi_power_law_is_the_sum_of_the_paper(kind: str) -> None:
    lr_T, warmup = factors(120, kind=kind)
    reference_T = summed_law(lr_T, warmup, LAW)
    law = MultiPowerLaw(curve(reference_T, lr_T, warmup), segments=120 - warmup)
    step_M = np.arange(warmup + 1, 121)
    loss_M, _ = law.loss(theta_of(law, LAW), step_M.astype(float))
    np.testing.assert_allclose(loss_M, reference_T[warmup:], rtol=1e-12)
    np.testing.assert_allclose(fast_law(lr_T, warmup, LAW)[warmup:], reference_T[warmup:], rtol=1e-12)


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_few_segments_are_near_the_sum(kind: str) -> None:
    lr_T, warmup = factors(3000, kind=kind, final=0.1)
    reference_T = fast_law(lr_T, warmup, LAW)
    law = MultiPowerLaw(curve(reference_T, lr_T, warmup))
    loss_M, _ = law.loss(theta_of(law, LAW), np.arange(warmup + 1.0, 3001))
    np.testing.assert_allclose(loss_M, reference_T[warmup:], rtol=1e-3)


def test_derivatives() -> None:
    lr_T, warmup = factors(400)
    known = curve(fast_law(lr_T, warmup, LAW), lr_T, warmup, noise=0.02).until(360)
    for law in (MultiPowerLaw(known), PowerLaw(known)):
        theta_P = law.mean_P + 0.1
        for step in (50.0, 300.0, 390.5):
            numeric_P = approx_fprime(theta_P, lambda x, law=law, step=step: law.loss(x, np.array([step]))[0][0], 1e-7)
            np.testing.assert_allclose(law.loss(theta_P, np.array([step]))[1][0], numeric_P, rtol=1e-4, atol=1e-6)


def test_end_of_a_wsd_run_is_found_from_the_first_half_of_its_decay() -> None:
    lr_T, warmup = factors(2000)
    loss_T = fast_law(lr_T, warmup, LAW)
    known = curve(loss_T, lr_T, warmup, noise=0.02).until(1700)
    end = loss_T[-known.window :].mean()
    said = multi_power_law(known, 0).at(known.near(2000)).mean()
    assert abs(said / end - 1) < 0.01
    blind = power_law(known, 0).at(known.near(2000)).mean()
    assert blind / end - 1 > 0.03  # it does not know that the learning rate goes on to fall


def test_parameters_are_found_again_once_all_is_seen() -> None:
    other = LAW | {"L0": 1.6, "alpha": 0.45, "B": 0.7, "A": 3.0}
    lr_T, warmup = factors(2500, kind="cosine")
    whole = curve(fast_law(lr_T, warmup, other), lr_T, warmup, noise=0.002)
    law = MultiPowerLaw(whole)
    found = fit(law, whole.bins, np.random.default_rng(0))
    assert found.error < 0.002
    np.testing.assert_allclose(np.exp(found.theta_P[[0, 3]]), [1.6, 0.7], rtol=0.25)


def test_what_an_unseen_decay_brings_is_said_to_be_a_prior() -> None:
    lr_T, warmup = factors(1000)
    whole = curve(fast_law(lr_T, warmup, LAW), lr_T, warmup, noise=0.02)
    assert "prior" in multi_power_law(whole.until(500), 0).note
    assert multi_power_law(whole.until(900), 0).note == ""
    lr_T, warmup = factors(1000, kind="constant")
    assert multi_power_law(curve(fast_law(lr_T, warmup, LAW), lr_T, warmup, noise=0.02).until(500), 0).note == ""


def test_power_law_by_hand() -> None:
    lr_T, warmup = factors(1000, kind="constant")
    step_T = np.arange(1, 1001)
    known = Curve(step_T, 0.6 + 4.0 * step_T**-0.35, lr_T, warmup).until(500)
    law = PowerLaw(known)
    loss_M, _ = law.loss(np.log([0.6, 4.0 * 500**-0.35, 0.35]), np.array([500.0, 1000.0]))
    np.testing.assert_allclose(loss_M, [0.6 + 4.0 * 500**-0.35, 0.6 + 4.0 * 1000**-0.35], rtol=1e-12)
    said = power_law(known, 0).at(np.array([1000]))[0]
    assert said == pytest.approx(0.6 + 4.0 * 1000**-0.35, rel=0.005)


def test_last_value_is_the_mean_of_the_last_window() -> None:
    lr_T, warmup = factors(100)
    loss_N = np.arange(80, 0, -1.0)
    known = Curve(np.arange(1, 81), loss_N, lr_T, warmup)
    assert known.window == 20
    assert last_value(known, 0).at(np.array([90, 100])).tolist() == [10.5, 10.5]  # mean of 20..1


def test_only_real_applied_steps_count() -> None:
    row = {"phase": "full", "was_predicted": False, "skipped": None}
    rows = [{**row, "step": step, "loss": 3.0} for step in range(1, 9)]
    rows[0] |= {"step": 0, "loss": None, "phase": None}
    rows[1] |= {"phase": "predict"}
    rows[2] |= {"was_predicted": True}
    rows[3] |= {"skipped": "spike: loss"}
    rows[4] |= {"loss": None}
    rows[5] |= {"phase": "skipped"}
    assert curve_of(rows, np.ones(100), 0).step_N.tolist() == [7, 8]
    assert curve_of(rows, np.ones(7), 0).step_N.tolist() == [7]  # beyond the schedule there is nothing to forecast


def test_too_few_losses_are_named() -> None:
    lr_T, warmup = factors(400)
    whole = curve(fast_law(lr_T, warmup, LAW), lr_T, warmup)
    first = whole.first
    with pytest.raises(UsageError, match=f"{LEAST - 1} losses after step {first}"):
        _ = whole.until(first + LEAST - 1).bins
    assert math.isclose(whole.until(first + LEAST).bins.log_B[0], np.log(whole.loss_N[first : first + 3].mean()))
