"""Statistics by group: the kernel (interpreted) and the CPU path against sums in float64, and what compilers make of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from scale_kernels.chunks import chunks_of
from scale_kernels.encode.op import EncodePlan, encode
from scale_kernels.encode.reference import COLUMNS, PAIRS, encode_reference

from tests.kernels.interpreter import interpreted
from tests.kernels.shards import BF16, FP32, ODD, ODD_GROUPS, four_lists, run_encode, tensors, unaligned

MIXED = (FP32, BF16, FP32, BF16)
DTYPES = [(FP32,) * 4, (BF16,) * 4, MIXED]


def kernel(lists, group_N, groups):
    return interpreted(run_encode, lists, group_N, groups)


def on_cpu(lists, group_N, groups):
    return encode(*lists, group_N, groups)


def close(found_GC, lists, group_N, groups):
    """Errors are measured against the sum of absolute values, as signs may cancel; the last two columns are exact."""
    expected_GC = encode_reference(lists, group_N, groups)
    absolute = [None if tensors is None else [x.abs() for x in tensors] for tensors in lists]
    scale_GC = encode_reference(absolute, group_N, groups)
    error_GC = (found_GC - expected_GC).abs()
    assert (error_GC[:, :10] <= 4e-6 * scale_GC[:, :10]).all(), error_GC / scale_GC
    assert torch.equal(found_GC[:, 10:], expected_GC[:, 10:])


def test_reference_by_hand():
    p, g, d, u = [torch.tensor([1.0, 2.0])], [torch.tensor([-3.0, 0.5])], None, [torch.tensor([math.inf, 1.0])]
    row = dict(zip(COLUMNS, encode_reference([p, g, d, u], [1], 2)[1].tolist(), strict=True))
    assert (row["pp"], row["pg"], row["gg"], row["max_abs_g"], row["nonfinite_g"]) == (5, -2, 9.25, 3, 0)
    assert row["pu"] == math.inf and row["pd"] == row["du"] == 0
    assert encode_reference([p, g, d, u], [1], 2)[0].tolist() == [0.0] * 12


@pytest.mark.parametrize("run", [kernel, on_cpu])
@pytest.mark.parametrize("dtypes", DTYPES, ids=["fp32", "bf16", "mixed"])
def test_odd_shapes_and_empty_groups(run, dtypes):
    lists = four_lists(ODD, dtypes)
    found_GC = run(lists, ODD_GROUPS, 6)
    close(found_GC, lists, ODD_GROUPS, 6)
    assert not found_GC[[3, 5]].any()


@pytest.mark.parametrize("run", [kernel, on_cpu])
def test_missing_lists_are_zeros(run):
    p, g, d, u = four_lists(ODD, MIXED)
    for lists in ([p, g, None, None], [None, g, d, None], [p, None, d, u], [None, None, None, u]):
        close(run(lists, ODD_GROUPS, 6), lists, ODD_GROUPS, 6)


@pytest.mark.parametrize("run", [kernel, on_cpu])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_is_not_finite_is_counted_and_shows_in_the_maximum(run, dtype):
    lists = four_lists([(2500,), (3000,), (50,)], (dtype,) * 4)
    g = lists[1]
    g[0][[0, 2047, 2499]] = torch.tensor([math.inf, -math.inf, math.inf], dtype=dtype)
    g[1][[7, 2999]] = torch.tensor([math.nan, -math.inf], dtype=dtype)
    found_GC = run(lists, [0, 1, 2], 3)
    assert found_GC[:, 11].tolist() == [3, 2, 0]
    assert found_GC[0, 10] == math.inf and found_GC[1, 10].isnan() and found_GC[2, 10] == g[2].abs().max()
    for column, pair in enumerate(PAIRS):
        assert found_GC[:, column].isfinite().tolist() == (["g" not in pair] * 2 + [True]), pair


@pytest.mark.parametrize("run", [kernel, on_cpu])
def test_large_finite_gradients_are_not_counted(run):
    g = [torch.full((100,), 1e30)]
    row = run([None, g, None, None], [0], 1)[0]
    assert row[4] == math.inf and row[10] == torch.tensor(1e30) and row[11] == 0


@pytest.mark.parametrize("run", [kernel, on_cpu])
def test_many_tiny_tensors_at_all_alignments(run):
    shapes = [(1 + n % 5,) for n in range(200)]
    lists = four_lists(shapes, MIXED)
    lists[0][::3] = [unaligned(x) for x in lists[0][::3]]
    group_N = [n % 16 for n in range(200)]
    close(run(lists, group_N, 16), lists, group_N, 16)


def test_a_list_of_two_dtypes():
    lists = four_lists(ODD, (FP32,) * 4)
    lists[1][3:] = [x.bfloat16() for x in lists[1][3:]]
    close(kernel(lists, ODD_GROUPS, 6), lists, ODD_GROUPS, 6)
    close(on_cpu(lists, ODD_GROUPS, 6), lists, ODD_GROUPS, 6)


@pytest.mark.parametrize("run", [kernel, on_cpu])
@settings(max_examples=15, deadline=None, derandomize=True)
@drawn(
    shapes=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5),
    dtypes=st.tuples(*[st.sampled_from([FP32, BF16])] * 4),
    data=st.data(),
)
def test_any_shapes(run, shapes, dtypes, data):
    group_N = [data.draw(st.integers(0, 3)) for _ in shapes]
    lists = four_lists(shapes, dtypes)
    close(run(lists, group_N, 4), lists, group_N, 4)


@pytest.mark.parametrize("run", [kernel, on_cpu])
def test_the_same_bits_every_time(run):
    lists = four_lists([(9000,), (4097,)], (FP32,) * 4)
    assert torch.equal(run(lists, [0, 0], 1), run(lists, [0, 0], 1))


def test_sums_stay_accurate_where_plain_addition_stops():
    """2^24 + 1 is no fp32 number: a running fp32 sum of ones would stay there."""
    ones = [torch.ones(2**24 + 4097)]
    assert encode(ones, ones, None, None, [0], 1)[0, 0] == torch.tensor(float(2**24 + 4097))


def test_a_plan_follows_new_tensors_and_new_shapes():
    plan = EncodePlan([0, 1], 2)
    for seed, shapes in ((0, [(50,), (70,)]), (1, [(50,), (70,)]), (2, [(5, 5), (700,)])):
        lists = four_lists(shapes, (FP32,) * 4, seed)
        close(plan(*lists), lists, [0, 1], 2)


def test_chunks_cover_every_element_once():
    sizes, group_N = [10, 0, 3, 7, 25], [1, 0, 1, 0, 1]
    chunks = chunks_of(sizes, group_N, 8)
    assert [(c.group, c.length) for c in chunks] == [(0, 7), (1, 8), (1, 8), (1, 8), (1, 8), (1, 6)]
    seen = [(n, i) for c in chunks for n, begin, end in c.pieces for i in range(begin, end)]
    assert sorted(seen) == [(n, i) for n, size in enumerate(sizes) for i in range(size)]
    assert all(group_N[n] == c.group for c in chunks for n, _, _ in c.pieces)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lists: lists[1].pop(), "grads has 1 tensors"),
        (lambda lists: lists[2].__setitem__(0, torch.zeros(5)), "drifts\\[0\\] is \\(5,\\)"),
        (lambda lists: lists[3].__setitem__(1, torch.zeros(6, dtype=torch.float64)), "updates\\[1\\] is torch.float64"),
        (lambda lists: lists[0].__setitem__(0, torch.zeros(3, 4).T), "not contiguous"),
        (lambda lists: lists.__setitem__(slice(0, 4), [None] * 4), "no list of tensors"),
    ],
)
def test_lists_that_do_not_fit(change, message):
    lists = four_lists([(4, 3), (6,)], (FP32,) * 4)
    change(lists)
    with pytest.raises(ValueError, match=message):
        encode(*lists, [0, 1], 2)


@pytest.mark.parametrize(("group_N", "groups"), [([0, 2], 2), ([-1, 0], 2), ([0, 0], 17), ([0, 0], 0)])
def test_groups_that_do_not_fit(group_N, groups):
    with pytest.raises(ValueError, match="group"):
        encode(None, tensors([(3,), (4,)], FP32, 0), None, None, group_N, groups)
