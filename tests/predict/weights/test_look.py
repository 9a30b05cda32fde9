"""Looks against sums in float64, over a trajectory whose steps and learning rates differ."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from scale.errors import ScaleError
from scale.parallel.ranks import Ranks
from scale.predict.groups import KINDS
from scale.predict.weights.carry import Carry
from scale.predict.weights.directions.drift import DECAY
from scale.predict.weights.look import Looks
from tests.predict.weights.parts import SHAPES, drawn, of_kind, shards_of, walk

STEPS = [3, 1, 2, 5]
FACTORS = [0.5, 1.0, 0.25, 0.8]
ALL = ("drift", "window", "optimizer", "singular", "masked_slope")


def look(looks, step, params, grads):
    looks.begin(step)
    looks(shards_of(params, grads))


def look_at(looks, points, grads, steps, factors):
    """A look at every point, and between two of them so many steps at such a factor."""
    step = 1
    for n, point in enumerate(points):
        look(looks, step, point, grads[n])
        if n < len(points) - 1:
            for _ in range(steps[n]):
                looks.moved(factors[n])
                step += 1


def expected(points, grads):
    """The last table by hand: column products of p, g, d, u over the elements of each kind."""
    units = [
        {name: (b[name].double() - a[name].double()) / (n * f) for name in SHAPES}
        for (a, b), n, f in zip(pairwise(points), STEPS, FACTORS, strict=True)
    ]
    ages = np.cumsum([0, *STEPS[::-1]])[::-1]  # steps from the end to each look
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
    looks = Looks(Ranks(), shards_of(points[0], copies=copies), ["drift"])
    look_at(looks, points, grads, STEPS, FACTORS)
    by_hand = expected(points, grads)
    counts = {KINDS.index(k): of_kind(points[0], k).size for k in KINDS}
    norm = KINDS.index("norm")
    share = np.ones(len(KINDS))
    share[norm] /= copies.get("model.norm.weight", 1)  # a world of one: all sums are of one copy's share
    if len(copies) > 1:
        share[:] = 1 / 4
    assert looks.last is not None and looks.last.step == 1 + sum(STEPS)
    sums = [c for c in range(12) if c != 10]
    scale = np.sqrt(np.outer(*[by_hand[:, [0, 4, 7, 9]].sum(0)] * 2))[np.triu_indices(4)].max()
    np.testing.assert_allclose(
        looks.last.table_GC[:, sums], by_hand[:, sums] * share[:, None], rtol=2e-4, atol=1e-6 * scale
    )
    np.testing.assert_allclose(looks.last.table_GC[:, 10], by_hand[:, 10], rtol=1e-7)
    np.testing.assert_array_equal(looks.last.elements_G, np.round([counts[g] * share[g] for g in range(len(KINDS))]))


def test_the_first_look_and_one_after_a_jump_know_no_update():
    points = walk(3)
    looks = Looks(Ranks(), shards_of(points[0]), ["optimizer"])
    for _ in range(2):
        look(looks, 1, points[0], drawn(9))
        assert not looks.last.table_GC[:, [3, 6, 8, 9]].any() and looks.last.table_GC[:, 0].any()
        assert looks.directions["optimizer"].vectors() is None
        looks.moved(1.0)
        look(looks, 2, points[1], drawn(9))
        assert looks.last.table_GC[:, 9].any() and looks.directions["optimizer"].vectors() is not None
        looks.moved(1.0)
        looks.restart()


def test_steps_that_were_not_applied_or_had_no_learning_rate_are_no_time():
    points, looks = walk(3), Looks(Ranks(), shards_of(walk(1)[0]), ["optimizer"])
    look(looks, 1, points[0], {})
    look(looks, 2, points[0], {})  # the step was vetoed
    assert looks.directions["optimizer"].vectors() is None and not looks.last.table_GC[:, 9].any()
    for factor in (0.0, 0.5):
        looks.moved(factor)
    look(looks, 4, points[1], {})
    found, name = looks.directions["optimizer"].vectors()[0], next(iter(SHAPES))
    torch.testing.assert_close(found, (points[1][name] - points[0][name]) / 0.5)


def test_non_finite_gradients_are_counted():
    grads = drawn(3)
    grads["model.norm.weight"][1:3] = float("inf")
    looks = Looks(Ranks(), shards_of(drawn(0)), [])
    look(looks, 1, drawn(0), grads)
    assert looks.last.table_GC[KINDS.index("norm"), 10:].tolist() == [float("inf"), 2.0]
    assert looks.last.table_GC[KINDS.index("q"), 11] == 0


def test_due():
    looks = Looks(Ranks(), shards_of(drawn(0)), [], every=3)
    assert [step for step in range(1, 10) if looks.due(step)] == [3, 6, 9]


def test_nothing_that_is_looked_at_changes():
    params, grads = drawn(0), drawn(1)
    before = [t.clone() for t in (*params.values(), *grads.values())]
    rng = torch.get_rng_state()
    looks = Looks(Ranks(), shards_of(params), ALL, carry=Carry(Ranks(), shards_of(params), 1, 2))
    for step in range(15):
        look(looks, step, params, grads)
        looks.moved(1.0)
    for direction in looks.directions.values():
        direction.vectors()
    assert all(map(torch.equal, before, [*params.values(), *grads.values()]))
    assert torch.equal(rng, torch.get_rng_state())


def bits(looks):
    vectors = {name: d.vectors() for name, d in looks.directions.items()}
    return {
        "table": looks.last.table_GC.tobytes(),
        "carry": json.dumps(looks.carry.last),
        "vectors": {n: None if v is None else [x.numpy().tobytes() for x in v] for n, v in vectors.items()},
    }


@pytest.mark.parametrize("cut", [1, 4, 13, 25])
def test_a_resumed_run_goes_on_bit_for_bit(cut):
    points, params = walk(32), drawn(0)
    make = lambda: Looks(Ranks(), shards_of(params), ALL, carry=Carry(Ranks(), shards_of(params), 3, 6))  # noqa: E731
    straight, other = make(), make()
    for n, point in enumerate(points):
        look(straight, n, point, drawn(n))
        straight.moved(0.1 + n / 40)
        if n == cut:
            other.load_state_dict(json.loads(json.dumps(straight.state_dict())))
            kept, room = straight.companions(), other.companions()
            assert kept.keys() == room.keys()
            for key, tensors in kept.items():
                for name, tensor in tensors.items():
                    room[key][name].copy_(tensor)
            assert bits(other) == bits(straight)
        if n > cut:
            look(other, n, point, drawn(n))
            other.moved(0.1 + n / 40)
            assert bits(other) == bits(straight)


def test_other_directions_than_the_saved_ones_are_refused():
    saved = Looks(Ranks(), shards_of(drawn(0)), ["window"]).state_dict()
    with pytest.raises(
        ScaleError, match=r"holds the predict\.directions drift, window, this run wants drift, optimizer"
    ):
        Looks(Ranks(), shards_of(drawn(0)), ["optimizer"]).load_state_dict(saved)
