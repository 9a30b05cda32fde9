"""Steps along directions: the kernel (interpreted) and the CPU path, bit for bit against plain torch; rounding to bf16."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from scale_kernels.delta.op import DeltaPlan, delta
from scale_kernels.delta.reference import delta_reference, philox_rounds, random_bits, round_stochastic
from scale_kernels.tensor_table import first_indices

from tests.kernels.interpreter import interpreted
from tests.kernels.shards import BF16, FP32, ODD, ODD_GROUPS, four_lists, run_delta, tensors, unaligned

SEED = 0x123456789ABCDEF


def kernel(params, directions, c_KG, group_N, seed=SEED, tile=2048):
    return interpreted(run_delta, params, directions, c_KG, group_N, [seed], tile)[0]


def on_cpu(params, directions, c_KG, group_N, seed=SEED):
    moved = [x.clone() for x in params]
    delta(moved, directions, c_KG, group_N, seed)
    return moved


def expected(params, directions, c_KG, group_N, seed=SEED):
    moved = [x.clone() for x in params]
    delta_reference(moved, directions, c_KG, group_N, first_indices([x.numel() for x in params]), seed)
    return moved


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def coefficients(directions, groups):
    return torch.randn(directions, groups, generator=torch.Generator().manual_seed(9))


def test_reference_by_hand():
    params = [torch.tensor([1.0, 2.0]), torch.tensor([[4.0]])]
    directions = [[torch.tensor([1.0, -1.0]), torch.tensor([[2.0]])], [torch.tensor([0.0, 4.0]), torch.tensor([[1.0]])]]
    moved = expected(params, directions, torch.tensor([[0.5, 3.0], [0.25, -1.0]]), [0, 1])
    assert moved[0].tolist() == [1.5, 2.5] and moved[1].tolist() == [[9.0]]


@pytest.mark.parametrize("run", [kernel, on_cpu])
@pytest.mark.parametrize("directions", [1, 2, 3, 4])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP32, BF16), (BF16, FP32), (BF16, BF16)])
def test_every_bit_is_the_references(run, directions, dtypes):
    params = tensors(ODD, dtypes[0], 0)
    along = [tensors(ODD, dtypes[1], 1 + k) for k in range(directions)]
    c_KG = coefficients(directions, 6)
    found = run(params, along, c_KG, ODD_GROUPS)
    assert same(found, expected(params, along, c_KG, ODD_GROUPS))
    assert not same(found, params)


@pytest.mark.parametrize("run", [kernel, on_cpu])
def test_against_float64(run):
    params, *along = four_lists(ODD, (FP32,) * 4)
    c_KG = coefficients(3, 6)
    for n, moved in enumerate(run(params, along, c_KG, ODD_GROUPS)):
        steps = [c_KG[k, ODD_GROUPS[n]].double() * along[k][n].double() for k in range(3)]
        exact = params[n].double() + sum(steps)
        size = params[n].double().abs() + sum(step.abs() for step in steps)
        assert ((moved.double() - exact).abs() <= 6 * 2**-24 * size).all()


@pytest.mark.parametrize("run", [kernel, on_cpu])
def test_many_tiny_tensors_of_two_dtypes_at_all_alignments(run):
    shapes = [(1 + n % 5,) for n in range(200)]
    params = [x.to(BF16 if n % 2 else FP32) for n, x in enumerate(tensors(shapes, FP32, 0))]
    params[::3] = [unaligned(x) for x in params[::3]]
    along = [tensors(shapes, BF16, 1)]
    group_N = [n % 7 for n in range(200)]
    c_KG = coefficients(1, 7)
    assert same(run(params, along, c_KG, group_N), expected(params, along, c_KG, group_N))


@pytest.mark.parametrize("run", [kernel, on_cpu])
@settings(max_examples=10, deadline=None, derandomize=True)
@drawn(
    shapes=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5),
    dtypes=st.tuples(*[st.sampled_from([FP32, BF16])] * 3),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_any_shapes_and_seeds(run, shapes, dtypes, seed, data):
    params, *along = [tensors(shapes, dtype, k) for k, dtype in enumerate(dtypes)]
    group_N = [data.draw(st.integers(0, 3)) for _ in shapes]
    c_KG = coefficients(2, 4)
    assert same(run(params, along, c_KG, group_N, seed), expected(params, along, c_KG, group_N, seed))


def test_the_size_of_tiles_changes_nothing():
    params, along = tensors([(9001,), (77,)], BF16, 0), [tensors([(9001,), (77,)], FP32, 1)]
    c_KG = coefficients(1, 2)
    assert same(kernel(params, along, c_KG, [0, 1], tile=2048), kernel(params, along, c_KG, [0, 1], tile=8192))


def test_philox_gives_the_published_numbers():
    """Known answers of Random123 for philox4x32-10."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counters, key, answer in (
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        words = philox_rounds(tuple(torch.tensor([c]) for c in counters), key)
        assert tuple(int(word) for word in words) == answer


def test_random_bits_are_uniform_and_differ_between_neighbours_and_seeds():
    index = torch.arange(2**16)
    bits = random_bits(index, 5)
    counts = torch.bincount(bits >> 8, minlength=256).double()
    assert ((counts - 256) ** 2 / 256).sum() < 350  # chi-squared, 255 degrees of freedom: p = 1e-4
    centred = bits.double() / 2**16 - 0.5
    for other in (centred.roll(1), centred.roll(8), random_bits(index, 6).double() / 2**16 - 0.5):
        assert abs((centred * other).mean() * 12) < 5 / 256
    far = random_bits(index + 2**35, 5)
    assert (far == bits).double().mean() < 1e-3


def from_the_kernel(x, seed_count):
    """Each seed moves ones to `x`."""
    ones = [torch.ones(len(x)).bfloat16()]
    seeds = range(seed_count)
    return [moved[0] for moved in interpreted(run_delta, ones, [[x - 1]], torch.ones(1, 1), [0], seeds)]


def from_the_reference(x, seed_count):
    return [round_stochastic(x, 0, seed) for seed in range(seed_count)]


@pytest.mark.parametrize(
    ("run", "sign", "exponent"), [(from_the_kernel, 1, 0), (from_the_reference, -1, -20), (from_the_reference, 1, 100)]
)
def test_rounding_has_the_right_mean(run, sign, exponent):
    """Over 60 seeds and 320 neighbours, of values at known fractions of the way between two bf16."""
    fraction_F = torch.tensor([0.0, 1 / 512, 0.25, 0.5, 0.875, 1 - 1 / 512])
    x = sign * (1 + 2**-7 * fraction_F.repeat_interleave(320)) * 2.0**exponent
    up = torch.stack([(moved.float() * sign / 2.0**exponent - 1) * 128 for moved in run(x, 60)])
    assert set(up.unique().tolist()) <= {0.0, 1.0}
    share_F = up.view(60, 6, 320).mean((0, 2))
    assert ((share_F - fraction_F).abs() <= 5 * (fraction_F * (1 - fraction_F) / (60 * 320)).sqrt()).all(), share_F


def test_rounding_goes_to_a_neighbour():
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(3))
    x = bits.to(torch.int32).view(torch.float32)
    x = x[x.isfinite()]
    low = (x.view(torch.int32) & -65536).view(torch.float32)
    for seed in range(5):
        found = round_stochastic(x, 0, seed)
        assert found.isfinite().all()
        steps = found.view(torch.int16).int() - (low.view(torch.int32) >> 16)
        assert ((steps == 0) | ((steps == 1) & (low != x))).all()


def test_values_at_the_ends():
    largest = torch.finfo(BF16).max
    above = torch.tensor(largest) * (1 + 2**-9)
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, largest, above, -above, 2.0**-133, 2.0**-140])
    nan_of_low_bits = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    x = torch.cat([x, nan_of_low_bits])
    zeros = [torch.zeros(len(x)).bfloat16()]
    for seed in range(10):
        found = kernel(zeros, [[x]], torch.ones(1, 1), [0], seed)[0].float()
        assert found[:2].tolist() == [math.inf, -math.inf] and found[[2, 10, 11]].isnan().all()
        assert found[3:8].tolist() == [0, 0, largest, largest, -largest]
        assert found[8] == 2.0**-133 and found[9] in (0, 2.0**-133)


def test_no_step_leaves_every_bit():
    params = tensors([(3000,)], BF16, 0)
    assert same(kernel(params, [tensors([(3000,)], BF16, 1)], torch.zeros(1, 1), [0]), params)


def test_a_plan_follows_new_tensors():
    plan = DeltaPlan([0, 1], 2)
    for seed in (0, 1):
        params, along = tensors([(50,), (7, 3)], FP32, seed), [tensors([(50,), (7, 3)], FP32, seed + 5)]
        c_KG = coefficients(1, 2)
        wanted = expected(params, along, c_KG, [0, 1])
        plan(params, along, c_KG)
        assert same(params, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c_KG": torch.tensor([[1.0, math.nan]])}, "not finite"),
        ({"c_KG": torch.tensor([[math.inf, 0.0]])}, "not finite"),
        ({"c_KG": torch.zeros(2, 2)}, "coefficients are \\(2, 2\\)"),
        ({"c_KG": torch.zeros(1, 2, dtype=torch.float64)}, "float64"),
        ({"params": tensors([(4,), (5,)], BF16, 0)}, "a seed is needed"),
        ({"params": tensors([(4,), (5,)], BF16, 0), "seed": -1}, "seed -1"),
        ({"directions": []}, "0 directions"),
        ({"directions": [tensors([(4,), (5,)], FP32, 0)] * 5, "c_KG": torch.zeros(5, 2)}, "5 directions"),
        ({"directions": [tensors([(4,), (6,)], FP32, 0)]}, "directions\\[0\\]\\[1\\] is \\(6,\\)"),
    ],
)
def test_what_does_not_fit_moves_nothing(change, message):
    given = {"params": tensors([(4,), (5,)], FP32, 0), "directions": [tensors([(4,), (5,)], FP32, 1)]}
    given |= {"c_KG": torch.ones(1, 2)} | change
    before = [x.clone() for x in given["params"]]
    with pytest.raises(ValueError, match=message):
        delta(group_N=[0, 1], **given)
    assert same(given["params"], before)
