import math

import pytest

from scale.config.optim import ScheduleConfig
from scale.train.schedule import lr_factor


def factors(steps=100, **fields):
    config = ScheduleConfig(**fields)
    return [lr_factor(config, step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear", "constant"])
def test_warmup_is_linear_and_ends_at_the_peak(kind):
    got = factors(kind=kind, warmup=10)
    assert got[:10] == pytest.approx([i / 10 for i in range(1, 11)]) and max(got) == 1.0


def test_wsd_is_flat_and_then_falls_linearly_over_its_last_part():
    got = factors(kind="wsd", warmup=10, decay=0.2, final=0.1)
    assert got[9:80] == [1.0] * 71
    assert got[80:] == pytest.approx([1 - 0.9 * i / 20 for i in range(1, 21)])


def test_cosine_against_the_formula():
    got = factors(kind="cosine", warmup=0, final=0.1)
    assert got[49] == pytest.approx(0.55) and got[-1] == pytest.approx(0.1)
    assert got[24] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))


def test_linear_ends_at_final_and_constant_stays():
    assert factors(kind="linear", warmup=0, final=0.0)[-1] == 0.0
    assert set(factors(kind="constant", warmup=0)) == {1.0}


def test_a_fraction_of_warmup_is_of_the_run():
    assert factors(kind="constant", warmup=0.5)[:50] == pytest.approx([i / 50 for i in range(1, 51)])


def test_warmup_longer_than_the_stable_part_wins_over_the_decay():
    got = factors(steps=10, kind="wsd", warmup=9, decay=0.5, final=0.0)
    assert got[:9] == pytest.approx([i / 9 for i in range(1, 10)]) and got[9] == 0.0
