"""Encode and delta on a real GPU, through the functions that choose."""

from __future__ import annotations

import math

import pytest
import torch
from scale_kernels.delta.op import DeltaPlan, delta
from scale_kernels.delta.reference import delta_reference
from scale_kernels.encode.op import EncodePlan, encode
from scale_kernels.tensor_table import first_indices

from tests.kernels.shards import BF16, FP32, ODD, ODD_GROUPS, four_lists, tensors, unaligned
from tests.kernels.test_encode import DTYPES, close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
SHAPES = [*ODD, (100_003,), (32768,)]
GROUPS = [*ODD_GROUPS, 1, 0]


def on_gpu(lists):
    return [None if given is None else [x.cuda() for x in given] for given in lists]


@pytest.mark.parametrize("dtypes", DTYPES, ids=["fp32", "bf16", "mixed"])
def test_encode(dtypes):
    lists = four_lists(SHAPES, dtypes)
    found_GC = encode(*on_gpu(lists), GROUPS, 6)
    assert found_GC.is_cuda
    close(found_GC.cpu(), lists, GROUPS, 6)


def test_encode_of_tensors_at_all_alignments_and_of_missing_lists():
    lists = four_lists([(1 + n % 5000,) for n in range(0, 20000, 100)], (FP32, BF16, FP32, BF16))
    lists[3] = None
    placed = on_gpu(lists)
    placed[0][::3] = [unaligned(x) for x in placed[0][::3]]
    group_N = [n % 16 for n in range(200)]
    close(encode(*placed, group_N, 16).cpu(), lists, group_N, 16)


def test_encode_counts_what_is_not_finite():
    lists = four_lists(SHAPES, (FP32,) * 4)
    lists[1][8][[0, 50_000, 100_002]] = torch.tensor([math.nan, math.inf, -math.inf])
    found_GC = encode(*on_gpu(lists), GROUPS, 6).cpu()
    assert found_GC[:, 11].tolist() == [0, 3, 0, 0, 0, 0] and found_GC[1, 10].isnan()


def test_encode_gives_the_same_bits_and_follows_new_tensors():
    plan = EncodePlan(GROUPS, 6)
    for seed in (0, 1):
        lists = four_lists(SHAPES, (FP32,) * 4, seed)
        placed = on_gpu(lists)
        first_GC = plan(*placed)
        assert all(torch.equal(first_GC, plan(*placed)) for _ in range(20))
        close(first_GC.cpu(), lists, GROUPS, 6)


def test_encode_beyond_two_to_the_31():
    size = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    grad = torch.ones(size, dtype=BF16, device="cuda")
    grad[-1] = 3
    row = encode(None, [grad], None, None, [0], 1)[0].cpu()
    assert row[4] == torch.tensor(float(size - 1 + 9)) and row[10] == 3 and row[11] == 0


@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP32, BF16), (BF16, FP32), (BF16, BF16)])
def test_delta(directions, dtypes):
    params = tensors(SHAPES, dtypes[0], 0)
    along = [tensors(SHAPES, dtypes[1], 1 + k) for k in range(directions)]
    c_KG = torch.randn(directions, 6, generator=torch.Generator().manual_seed(9))
    (placed,) = on_gpu([params])
    placed[3] = unaligned(placed[3])
    delta(placed, on_gpu(along), c_KG.cuda(), GROUPS, 2**62 + 12345)
    delta_reference(params, along, c_KG, GROUPS, first_indices([x.numel() for x in params]), 2**62 + 12345)
    assert all(torch.equal(found.cpu(), wanted) for found, wanted in zip(placed, params, strict=True))


def test_delta_refuses_coefficients_that_are_not_finite():
    params = [torch.ones(5, device="cuda")]
    with pytest.raises(ValueError, match="not finite"):
        DeltaPlan([0], 1)(params, [params], torch.tensor([[math.nan]], device="cuda"))
