"""What the world model is told before a step."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from scale.predict.features import NAMES, FeatureEncoder
from scale.predict.kinds import KINDS
from scale.predict.moments import ComingStep, MadeStep, Statistics
from scale.predict.signals import Signals
from tests.predict.planted import Planted, made, stats


def coming(step: int, lr_factor: float, position: float, tokens: int, seq_len: int) -> ComingStep:
    """A step before it is made."""
    return ComingStep(step=step, lr_factor=lr_factor, position=position, tokens=tokens, seq_len=seq_len)


def run(steps: list[MadeStep], looks: dict[int, Statistics] | None = None) -> list[list[float]]:
    """Features of every step; a look at the weights after every third."""
    signals, encoder, seen, look = Signals(2.5), FeatureEncoder(), [], None
    for facts in steps:
        seen.append(encoder.features(signals, facts, look))
        signals.update(facts)
        if facts.step == 150:
            signals.jumped()
        if facts.step % 3 == 0:
            look = (looks or {}).get(facts.step) or stats(facts.step)
    return seen


def steps(n: int = 300) -> list[MadeStep]:
    return [replace(facts, settling=150 < facts.step <= 155) for facts in Planted(n).facts()]


def test_there_are_64_and_all_of_them_vary_in_a_run_with_every_kind_and_a_curriculum() -> None:
    features = np.array(run(steps()))
    assert features.shape == (300, 64) == (300, len(NAMES))
    still = [name for name, column in zip(NAMES, features.T, strict=True) if column.std() < 1e-3]
    assert not still
    assert np.abs(features).max() <= 5
    assert len(set(NAMES.values())) == 64


def test_nothing_of_a_step_stands_in_its_features() -> None:
    known = steps()
    for t in (1, 40, 200):
        other = [f if f.step < t else replace(f, loss=f.loss * 7 - 3, grad_norm=f.grad_norm * 5) for f in known]
        looks = {s: stats(s, seed=9) for s in range(t, 301)}
        before, after = run(known), run(other, looks)
        assert before[:t] == after[:t]  # steps 1 to t
        assert before[t + 5] != after[t + 5]


def test_statistics_of_the_step_itself_are_refused() -> None:
    encoder, next_ = FeatureEncoder(), coming(5, 1.0, 0.1, 1000, 64)
    encoder.features(Signals(2.5), next_, stats(4))
    with pytest.raises(ValueError, match="not made yet"):
        encoder.features(Signals(2.5), next_, stats(5))


def test_values_by_hand() -> None:
    encoder, signals = FeatureEncoder(), Signals(2.5)
    facts = made(1, 2.0, 1.0, 0.25, 0.01, 1000, 64)
    signals.update(facts)
    tables, logs = [], []
    for step, (pp, gg, gd, dd, du, uu) in enumerate([(4, 1, 0.1, 1, 0.2, 4), (9, 4, -0.3, 2, 0.1, 1)], 1):
        table_GC = np.zeros((len(KINDS), 12))
        table_GC[3, [0, 4, 5, 7, 8, 9]] = pp, gg, gd, dd, du, uu
        tables.append(Statistics(step, table_GC, np.eye(len(KINDS))[3] * 100))
        drift, update = 0.5 * math.log(dd / pp), 0.5 * math.log(uu / 100) - math.log(0.25)
        logs.append([drift, gd / math.sqrt(dd * gg), du / math.sqrt(dd * uu), update])
    for look in tables:
        features = encoder.features(signals, coming(look.step + 1, 0.5, 0.2, 1000, 64), look)
    names = list(NAMES)
    at = names.index(f"drift_{KINDS[3]}")
    signs = np.sign(
        np.array(logs[1]) - np.array(logs[0])
    )  # the second of two values is sqrt(.5) deviations off the mean
    assert features[at : at + 4] == pytest.approx((signs * math.sqrt(0.5)).tolist())
    assert encoder.mean_F[at : at + 4] == pytest.approx(np.mean(logs, 0).tolist())
    assert features[names.index("lr_factor")] == 0.0 and features[names.index("position")] == pytest.approx(-0.6)
    others = [i for i in range(20, 64) if not at <= i < at + 4]
    assert all(features[i] == 0 for i in others)


def test_broken_numbers_become_zero_and_spoil_nothing() -> None:
    known = steps(60)
    broken = replace(known[20], loss=math.nan, grad_norm=math.inf)
    looks = {
        s: Statistics(s, np.full((len(KINDS), 12), bad), np.full(len(KINDS), 50))
        for s, bad in ((6, math.nan), (9, math.inf), (12, 0.0), (15, -1.0), (18, 1e300))
    }
    features = np.array(run([*known[:20], broken, *known[21:]], looks))
    assert np.isfinite(features).all() and np.abs(features).max() <= 5
    encoder = FeatureEncoder()
    with np.errstate(all="raise"):
        first = encoder.features(Signals(2.5), coming(1, 0.0, 0.0, 0, 0), None)
    assert np.isfinite(first).all()


def test_state_goes_on_bit_for_bit() -> None:
    signals, encoder, other = Signals(2.5), FeatureEncoder(), FeatureEncoder()
    for facts in steps(80):
        if facts.step == 40:
            other.load_state_dict(json.loads(json.dumps(encoder.state_dict())))
        look = stats(facts.step - 1)
        features = encoder.features(signals, facts, look)
        if facts.step >= 40:
            assert other.features(signals, facts, look) == features
        signals.update(facts)


def test_a_long_run_of_the_plain_formulas() -> None:
    """Running moments of numpy over all raw numbers so far, in float64, against the incremental ones."""
    signals, encoder, raw, look = Signals(2.5), FeatureEncoder(), [], None
    for facts in steps():
        found = encoder.features(signals, facts, look)
        raw.append(reference_kinds(look, signals.last_lr))
        if look is not None and facts.step > 7:
            seen = np.array([row for row in raw if row is not None])
            expected = np.clip((seen[-1] - seen.mean(0)) / seen.std(0, ddof=1).clip(1e-6), -5, 5)
            assert found[20:] == pytest.approx(expected.tolist(), abs=1e-9)
        signals.update(facts)
        if facts.step % 5 == 0:
            look = stats(facts.step)


def reference_kinds(look: Statistics | None, lr_factor: float) -> list[float] | None:
    if look is None:
        return None
    numbers: list[float] = []
    for (pp, _, _, _, gg, gd, _, dd, du, uu, *_), elements in zip(look.table_GC, look.elements_G, strict=True):
        rms = math.sqrt(uu / elements) / lr_factor
        numbers += [math.log(math.sqrt(dd / pp)), gd / math.sqrt(dd * gg), du / math.sqrt(dd * uu), math.log(rms)]
    return numbers


def test_global_features_by_hand() -> None:
    signals, encoder = Signals(2.5), FeatureEncoder()
    for facts in steps(40):
        signals.update(facts)
    encoder.features(signals, coming(41, 0.75, 0.2, 2000, 128), None)
    raw = dict(zip(NAMES, encoder.mean_F.tolist(), strict=True))  # of a single look: what was seen
    loss, noise = {scale: average.value for scale, average in signals.loss.items()}, signals.noise
    expected = {
        "loss_8": (facts.loss - loss[8]) / noise,
        "loss_32": (loss[8] - loss[32]) / noise,
        "loss_128": (loss[32] - loss[128]) / noise,
        "slope_32": signals.slope(32) * 32 / noise,
        "log_loss": math.log(loss[32]),
        "log_noise": math.log(noise / loss[32]),
        "grad_8": math.log(facts.grad_norm) - signals.log_grad[8].value,
        "lr_change": 0.75 - facts.lr_factor,
        "since_jump": math.log(41),
        "log_tokens": math.log(2000),
        "log_seq_len": math.log(128),
    }
    assert {name: raw[name] for name in expected} == pytest.approx(expected)
