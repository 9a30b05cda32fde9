"""Tiles, addresses and launches of lists of tensors, against tables worked out by hand."""

from __future__ import annotations

import pytest
import torch
from scale_kernels.tensor_table import TensorTable, check, describe, first_indices, given

from tests.kernels.shards import BF16, FP32, tensors, unaligned

SHAPES = [(5,), (0,), (2, 2), (9,)]


def test_tiles_lie_together_by_group():
    table = TensorTable([tensors(SHAPES, FP32, 0)], [1, 0, 0, 2], 4, tile=4)
    (launch,) = table.launches
    assert launch.tiles_T3.tolist() == [[0, 2, 0], [1, 0, 0], [2, 0, 1], [3, 3, 0], [4, 3, 1], [5, 3, 2]]
    assert table.first_tile_G1.tolist() == [0, 1, 3, 6, 6] and table.tiles == 6
    assert table.sizes_N.tolist() == [5, 0, 4, 9] and table.group_N.tolist() == [1, 0, 0, 2]
    assert table.first_index_N.tolist() == first_indices([5, 0, 4, 9]) == [0, 8, 8, 16]


def test_addresses_of_every_list():
    first, second = tensors(SHAPES, FP32, 0), tensors(SHAPES, BF16, 1)
    table = TensorTable([first, None, second], [0] * 4, 1, tile=4)
    assert table.addresses_SN.tolist() == [[x.data_ptr() for x in first], [0] * 4, [x.data_ptr() for x in second]]
    assert given([first, None, second]) == 0b101 and [launch.bf16 for launch in table.launches] == [0b100]


def test_a_launch_for_each_dtype_and_alignment():
    params = tensors([(8,), (8,), (8,)], FP32, 0)
    params = [params[0], params[1].bfloat16(), unaligned(params[2])]
    launches = TensorTable([params], [0, 0, 0], 1, tile=4).launches
    found = {(x.bf16, x.aligned): x.tiles_T3.tolist() for x in launches}
    assert found == {
        (0, True): [[0, 0, 0], [1, 0, 1]],
        (1, True): [[2, 1, 0], [3, 1, 1]],
        (0, False): [[4, 2, 0], [5, 2, 1]],
    }


def test_following_new_addresses():
    old, new = tensors([(8,), (9,)], FP32, 0), tensors([(8,), (9,)], FP32, 1)
    table = TensorTable([old], [0, 0], 1, tile=4)
    before = table.addresses_SN
    assert table.follow([old]) and table.addresses_SN is before
    assert table.follow([new]) and table.addresses_SN.tolist() == [[x.data_ptr() for x in new]]
    assert not table.follow([[new[0], unaligned(new[1])]])


def test_description_holds_all_that_is_checked():
    base = describe([[torch.zeros(4, 4)]])
    assert describe([[torch.ones(4, 4)]]) == base
    others = (torch.zeros(16), torch.zeros(4, 4).bfloat16(), torch.zeros(4, 4).T, torch.zeros(4, 4, device="meta"))
    assert all(describe([[other]]) != base for other in others) and describe([None]) != base


def test_nothing_to_do():
    table = TensorTable([[], None], [], 3, tile=4)
    assert table.launches == [] and table.tiles == 0 and table.first_tile_G1.tolist() == [0] * 4
    check([[], None], ("a", "b"), [], 3)


def test_devices_must_agree():
    with pytest.raises(ValueError, match="is on meta"):
        check([tensors([(3,)], FP32, 0), [torch.empty(3, device="meta")]], ("a", "b"), [0], 1)
