import math
import random

import pytest

from scale.config.optim import SpikeConfig
from scale.errors import ScaleError
from scale.train.spike import SpikeFilter


def settled(n=64, **fields):
    spikes = SpikeFilter(SpikeConfig(**{"sigma": 6, "window": 128, "max_consecutive": 3} | fields))
    rng = random.Random(0)
    for _ in range(n):
        assert spikes.judge(2 + rng.gauss(0, 0.1), 1 + rng.gauss(0, 0.05)) is None
    return spikes


@pytest.mark.parametrize(("loss", "norm", "what"), [
    (math.nan, 1.0, "non-finite loss"), (math.inf, 1.0, "non-finite loss"), (2.0, math.nan, "non-finite gradient norm"),
    (2.0, math.inf, "non-finite gradient norm"), (2.9, 1.0, "spike: loss"), (2.0, 1.5, "spike: gradient norm"),
])  # fmt: skip
def test_reasons(loss, norm, what):
    assert settled().judge(loss, norm).startswith(what)


def test_five_sigma_and_drops_pass():
    assert settled().judge(2.45, 1.0) is None and settled().judge(0.1, 0.01) is None


def test_no_spike_before_the_window_is_half_full_but_nan_always():
    assert settled(63).judge(50.0, 50.0) is None
    assert settled(0).judge(math.nan, 1.0) is not None


def test_no_gradient_at_all_is_refused_in_the_first_step_and_accepted_later():
    with pytest.raises(ScaleError, match="exactly 0 in the first step"):
        settled(0).judge(2.0, 0.0)
    assert settled(1).judge(2.0, 0.0) is None
    resumed = settled(0)
    resumed.load_state_dict(settled(1).state_dict())
    assert resumed.judge(2.0, 0.0) is None


def test_sigma_zero_switches_the_test_off():
    assert settled(sigma=0).judge(1e6, 1e6) is None


def test_a_lasting_change_of_level_is_accepted():
    spikes = settled(max_consecutive=100)
    reasons = [spikes.judge(3.0, 1.0) for _ in range(40)]
    assert reasons[0] is not None and reasons[-1] is None


def test_too_many_in_a_row_end_the_run_and_one_good_step_resets():
    spikes = settled()
    spikes.judge(math.nan, 1.0), spikes.judge(math.nan, 1.0)
    assert spikes.judge(2.0, 1.0) is None
    spikes.judge(math.nan, 1.0), spikes.judge(math.nan, 1.0)
    with pytest.raises(ScaleError, match="3 steps skipped in a row"):
        spikes.judge(math.nan, 1.0)


def test_state_round_trip():
    a, b = settled(), SpikeFilter(SpikeConfig())
    b.load_state_dict(a.state_dict())
    assert b.state_dict() == a.state_dict() and (b.judge(2.9, 1.0) is not None)
