from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.data.order import EpochOrder, permuted


@given(st.integers(1, 3000), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_every_place_has_another_image(size, seed):
    assert sorted(permuted(np.arange(size), size, [seed])) == list(range(size))


def test_an_image_does_not_depend_on_what_is_asked_with_it():
    whole = permuted(np.arange(1000), 1000, [5])
    assert [int(permuted(np.array([i]), 1000, [5])[0]) for i in (0, 17, 999)] == [int(whole[i]) for i in (0, 17, 999)]


def test_keys_give_unrelated_orders_that_look_random():
    a, b = (permuted(np.arange(20_000), 20_000, [7, epoch]) for epoch in (0, 1))
    for x, y in ((np.arange(20_000), a), (a, b)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.03  # 4 standard deviations of independent orders
    steps = np.abs(np.diff(a))
    assert steps.mean() == pytest.approx(20_000 / 3, rel=0.03)  # mean distance of two random places


def test_huge_sizes_need_no_memory():
    images = permuted(np.array([0, 1, 10**12]), 10**13, [0])
    assert len(set(images.tolist())) == 3 and images.max() < 10**13


@given(st.lists(st.integers(1, 200), min_size=1, max_size=50), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_the_pieces_of_an_epoch_cover_every_position_once(lengths, longest):
    order = EpochOrder(2, np.array(lengths), longest, seed=1)
    seen = Counter()
    for place in range(order.size):
        span = order.span(4, place)
        assert span.source == 2 and 0 < span.length <= longest and span.start % longest == 0
        seen.update((span.doc, p) for p in range(span.start, span.stop))
    assert seen == Counter((doc, p) for doc, n in enumerate(lengths) for p in range(n - 1))
    assert order.positions == len(seen)


def test_epochs_and_seeds_differ():
    orders = [EpochOrder(0, np.full(100, 9), 8, seed) for seed in (0, 1)]
    first, second = ([orders[0].span(epoch, i).doc for i in range(100)] for epoch in (0, 1))
    other = [orders[1].span(0, i).doc for i in range(100)]
    assert first != second and first != other and sorted(first) == sorted(second) == sorted(other)
