from __future__ import annotations

import numpy as np
import pytest
import torch

from scale.parallel.ranks import Ranks
from scale.predict.kinds import KINDS, kind_of
from scale.predict.weights.carry import Carry
from scale.predict.weights.sums import KindSums
from tests.predict.weights.parts import SHAPES, drawn, of_kind, shards_of

PRESENT = sorted({kind_of(name) for name in SHAPES})


def watch(points, lrs, every=1, span=100, direction=None, copies=None):
    """All readings at the points, each two steps after the last."""
    shards = shards_of(drawn(0), copies=copies)
    carry = Carry(KindSums(Ranks(), shards), shards, every, span)
    out = []
    for n, point in enumerate(points):
        table = carry.measure(
            list(point.values()), list((direction or drawn(1)).values()), 2 if n else 0, lrs[n] if n else 0.0
        )
        if table is not None:
            carry.read(carry.sums.whole([table])[0])
        out.append(carry.last and [round(x, 4) for x in carry.last])
        if table is not None:
            assert carry.last_steps % 2 == 0
    return carry, out


def line(times, bent=0.0, seed=9):
    """Points along drawn(1), with as much of something orthogonal to it, kind by kind."""
    start, along, aside = drawn(0), drawn(1), drawn(seed)
    for g in PRESENT:
        names = [name for name in SHAPES if kind_of(name) == g]
        a, d = of_kind(aside, KINDS[g]), of_kind(along, KINDS[g])
        share = float(a @ d / (d @ d))
        for name in names:
            aside[name] = aside[name] - share * along[name]
    return [{n: start[n] + t * ((1 - bent) * along[n] + bent * aside[n]) for n in SHAPES} for t in times]


@pytest.mark.parametrize(("bent", "expected"), [(0.0, 1.0), (1.0, 0.0), (0.25, 0.75)])
def test_a_straight_line_carries_fully_and_an_orthogonal_one_not_at_all(bent, expected):
    lrs = [0.0, 0.3, 0.1, 0.6]
    _, out = watch(line(np.cumsum(lrs).tolist(), bent), lrs)
    assert out[0] is None
    for reading in out[1:]:
        for g in range(len(KINDS)):
            assert np.isnan(reading[g]) if g not in PRESENT else reading[g] == pytest.approx(expected, abs=1e-3)


def test_random_continuation_against_float64():
    lrs = [0.0, 0.7, 0.4]
    points = [drawn(20 + n) for n in range(3)]
    carry, _ = watch(points, lrs, copies={"model.norm.weight": 3})
    for g in PRESENT:
        moved, d = of_kind(points[2], KINDS[g]) - of_kind(points[0], KINDS[g]), of_kind(drawn(1), KINDS[g])
        assert carry.last[g] == pytest.approx(moved @ d / (1.1 * d @ d), rel=1e-4)
    assert carry.last_steps == 4


def test_readings_come_when_due_and_the_anchor_moves_up():
    points = line([0.0, 1.0, 2.0, 3.0, 4.0]) + line([2.0, 0.0, -2.0, -4.0])  # on, then back twice as fast
    _, out = watch(points, [1.0] * 9, every=2, span=4)
    q = KINDS.index("q")
    assert [reading and reading[q] for reading in out] == [None, None, 1.0, None, 1.0, None, -2.0, None, -2.0]


def test_no_direction_no_anchor_and_no_line_no_reading():
    carry = Carry(KindSums(Ranks(), shards_of(drawn(0))), shards_of(drawn(0)), 1, 4)
    assert carry.measure(list(drawn(0).values()), None, 0, 0.0) is None and not carry.anchored
    resting = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    carry, out = watch(line([0.0, 1.0]), [0.0, 1.0], direction=resting)
    assert np.isnan(out[1]).all()
    carry.restart()
    assert carry.measure(list(drawn(0).values()), list(drawn(1).values()), 1, 1.0) is None and carry.anchored
