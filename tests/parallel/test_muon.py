"""Muon on matrices cut over real processes against torch.optim.Muon on whole ones."""

import pytest

from tests.distributed.harness import run_ranks
from tests.parallel.muon_ranks import SHAPES, STEPS


def check(found, world_size):
    for mesh in found[0]:
        for rank in found:
            away = rank[mesh]["away"]
            assert max(away["same"]) < 1e-6 and rank[mesh]["momenta"] < 1e-6
            assert min(away["no decay"]) > 1e-3 < min(away["no nesterov"][1:]), "a mistake would not show"
        calls = [rank[mesh]["calls"] for rank in found]
        assert [sum(each) for each in zip(*calls, strict=True)] == [len(SHAPES)] * STEPS
        assert max(map(max, calls)) == -(-len(SHAPES) // world_size), "one rank did the work of others"


def test_steps_are_those_of_whole_matrices_and_each_is_orthogonalised_once():
    check(run_ranks("tests.parallel.muon_ranks:step", 2, meshes=[[2], [1, 2], [2, 1]]), 2)


@pytest.mark.slow
def test_four_ranks_share_the_matrices_also_as_copies_of_shards():
    check(run_ranks("tests.parallel.muon_ranks:step", 4, meshes=[[4], [2, 2]]), 4)
