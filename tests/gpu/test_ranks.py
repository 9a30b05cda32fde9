"""FSDP2 over NCCL."""

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.gpu import DEVICE, GPU
from tests.gpu.parts import single

pytestmark = GPU


def test_one_rank_is_like_one_device():
    ran = run_ranks("tests.gpu.ranks:with_fsdp", 1, device=DEVICE)[0]
    assert ran["fsdp"] == pytest.approx(ran["single"], rel=1e-4)


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_two_ranks_are_like_one_device():
    ran = run_ranks("tests.gpu.ranks:with_fsdp", 2, device=DEVICE)
    assert ran[0] == ran[1] and ran[0]["fsdp"] == pytest.approx(single(DEVICE), rel=1e-4)
