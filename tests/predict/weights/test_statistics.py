"""Statistics against sums in float64, over a trajectory whose steps and learning rates differ."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from scale.errors import ScaleError
from scale.parallel.ranks import Ranks
from scale.predict.kinds import KINDS
from scale.predict.weights.directions import DECAY
from scale.predict.weights.statistics import StatisticsHook
from tests.predict.weights.parts import SHAPES, drawn, of_kind, shards_of, walk

STEPS = [3, 1, 2, 5]
FACTORS = [0.5, 1.0, 0.25, 0.8]
ALL = ("optimizer", "masked_slope")


def hook_of(params, every, span):
    """With all directions, and readings of carry as often."""
    hook = StatisticsHook(Ranks(), shards_of(params), ALL)
    hook.carry.every, hook.carry.span = every, span
    return hook


def call(hook, step, params, grads):
    hook.begin(step)
    hook(shards_of(params, grads))


def walk_along(hook, points, grads, steps, factors):
    """Statistics at every point, and between two of them so many steps at such a factor."""
    step = 1
    for n, point in enumerate(points):
        call(hook, step, point, grads[n])
        if n < len(points) - 1:
            for _ in range(steps[n]):
                hook.moved(factors[n])
                step += 1


def expected(points, grads):
    """The last table by hand: column products of p, g, d, u over the elements of each kind."""
    units = [
        {name: (b[name].double() - a[name].double()) / (n * f) for name in SHAPES}
        for (a, b), n, f in zip(pairwise(points), STEPS, FACTORS, strict=True)
    ]
    ages = np.cumsum([0, *STEPS[::-1]])[::-1]  # steps from the end to each point
    shares = [DECAY**end - DECAY**begin for begin, end in pairwise(ages)]
    drift = {name: sum(w * u[name] for w, u in zip(shares, units, strict=True)) / sum(shares) for name in SHAPES}
    update = {name: units[-1][name] * FACTORS[-1] for name in SHAPES}
    table = np.zeros((len(KINDS), 12))
    for g, kind in enumerate(KINDS):
        four = [of_kind(tensors, kind) for tensors in (points[-1], grads[-1], drift, update)]
        table[g, :10] = [four[i] @ four[j] for i in range(4) for j in range(i, 4)]
        table[g, 10] = abs(four[1]).max(initial=0.0)
    return table


@pytest.mark.parametrize("copies", [{}, {"model.norm.weight": 2}, dict.fromkeys(SHAPES, 4)])
def test_the_table_is_that_of_float64(copies):
    points, grads = walk(5), [drawn(100 + n) for n in range(5)]
    hook = StatisticsHook(Ranks(), shards_of(points[0], copies=copies), [])
    walk_along(hook, points, grads, STEPS, FACTORS)
    by_hand = expected(points, grads)
    counts = {KINDS.index(k): of_kind(points[0], k).size for k in KINDS}
    norm = KINDS.index("norm")
    share = np.ones(len(KINDS))
    share[norm] /= copies.get("model.norm.weight", 1)  # a world of one: all sums are of one copy's share
    if len(copies) > 1:
        share[:] = 1 / 4
    assert hook.last is not None and hook.last.step == 1 + sum(STEPS)
    sums = [c for c in range(12) if c != 10]
    scale = np.sqrt(np.outer(*[by_hand[:, [0, 4, 7, 9]].sum(0)] * 2))[np.triu_indices(4)].max()
    np.testing.assert_allclose(
        hook.last.table_GC[:, sums], by_hand[:, sums] * share[:, None], rtol=2e-4, atol=1e-6 * scale
    )
    np.testing.assert_allclose(hook.last.table_GC[:, 10], by_hand[:, 10], rtol=1e-7)
    np.testing.assert_array_equal(hook.last.elements_G, np.round([counts[g] * share[g] for g in range(len(KINDS))]))


def test_the_first_statistics_and_those_after_a_jump_know_no_update():
    points = walk(3)
    hook = StatisticsHook(Ranks(), shards_of(points[0]), ["optimizer"])
    for _ in range(2):
        call(hook, 1, points[0], drawn(9))
        assert not hook.last.table_GC[:, [3, 6, 8, 9]].any() and hook.last.table_GC[:, 0].any()
        assert hook.directions["optimizer"].vectors() is None
        hook.moved(1.0)
        call(hook, 2, points[1], drawn(9))
        assert hook.last.table_GC[:, 9].any() and hook.directions["optimizer"].vectors() is not None
        hook.moved(1.0)
        hook.restart()


def test_steps_that_were_not_applied_or_had_no_learning_rate_are_no_time():
    points, hook = walk(3), StatisticsHook(Ranks(), shards_of(walk(1)[0]), ["optimizer"])
    call(hook, 1, points[0], {})
    call(hook, 2, points[0], {})  # the step was vetoed
    assert hook.directions["optimizer"].vectors() is None and not hook.last.table_GC[:, 9].any()
    for factor in (0.0, 0.5):
        hook.moved(factor)
    call(hook, 4, points[1], {})
    found, name = hook.directions["optimizer"].vectors()[0], next(iter(SHAPES))
    torch.testing.assert_close(found, (points[1][name] - points[0][name]) / 0.5)


def test_non_finite_gradients_are_counted():
    grads = drawn(3)
    grads["model.norm.weight"][1:3] = float("inf")
    hook = StatisticsHook(Ranks(), shards_of(drawn(0)), [])
    call(hook, 1, drawn(0), grads)
    assert hook.last.table_GC[KINDS.index("norm"), 10:].tolist() == [float("inf"), 2.0]
    assert hook.last.table_GC[KINDS.index("q"), 11] == 0


def test_due():
    hook = StatisticsHook(Ranks(), shards_of(drawn(0)), [], every=3)
    assert [step for step in range(1, 10) if hook.due(step)] == [3, 6, 9]


def test_nothing_that_is_read_changes():
    params, grads = drawn(0), drawn(1)
    before = [t.clone() for t in (*params.values(), *grads.values())]
    rng = torch.get_rng_state()
    hook = hook_of(params, 1, 2)
    for step in range(15):
        call(hook, step, params, grads)
        hook.moved(1.0)
    for direction in hook.directions.values():
        direction.vectors()
    assert all(map(torch.equal, before, [*params.values(), *grads.values()]))
    assert torch.equal(rng, torch.get_rng_state())


def bits(hook):
    vectors = {name: d.vectors() for name, d in hook.directions.items()}
    return {
        "table": hook.last.table_GC.tobytes(),
        "carry": json.dumps(hook.carry.last),
        "vectors": {n: None if v is None else [x.numpy().tobytes() for x in v] for n, v in vectors.items()},
    }


@pytest.mark.parametrize("cut", [1, 4, 13, 25])
def test_a_resumed_run_goes_on_bit_for_bit(cut):
    points, params = walk(32), drawn(0)
    straight, other = hook_of(params, 3, 6), hook_of(params, 3, 6)
    for n, point in enumerate(points):
        call(straight, n, point, drawn(n))
        straight.moved(0.1 + n / 40)
        if n == cut:
            other.load_state_dict(json.loads(json.dumps(straight.state_dict())))
            kept, room = straight.tensors(), other.tensors()
            assert kept.keys() == room.keys()
            for key, tensors in kept.items():
                for name, tensor in tensors.items():
                    room[key][name].copy_(tensor)
            assert bits(other) == bits(straight)
        if n > cut:
            call(other, n, point, drawn(n))
            other.moved(0.1 + n / 40)
            assert bits(other) == bits(straight)


def test_other_directions_than_the_saved_ones_are_refused():
    saved = StatisticsHook(Ranks(), shards_of(drawn(0)), ["masked_slope"]).state_dict()
    with pytest.raises(ScaleError, match=r"holds the predict\.directions masked_slope, this run wants optimizer"):
        StatisticsHook(Ranks(), shards_of(drawn(0)), ["optimizer"]).load_state_dict(saved)
