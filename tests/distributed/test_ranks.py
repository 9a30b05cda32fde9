"""What processes exchange, in two and three real ones."""

from __future__ import annotations

import pytest
import torch

from scale.errors import ScaleError, UsageError
from scale.parallel.ranks import Ranks, join
from tests.distributed.harness import run_ranks


def exchange(ranks):
    return {
        "sum": ranks.all_sum(torch.tensor([1.0, float(ranks.rank)], dtype=torch.float64)).tolist(),
        "any": [ranks.any(False), ranks.any(ranks.rank == 1)],
        "gather": ranks.gather({"rank": ranks.rank, "text": "ä" * ranks.rank}),
        "lead": ranks.lead(lambda: [ranks.rank, "only rank 0 runs this"]),
        "long": [len(text) for text in ranks.gather("x" * 100_000 * ranks.rank)],
        "empty": ranks.lead(lambda: None),
    }


def test_every_rank_sees_the_same():
    results = run_ranks("tests.distributed.test_ranks:exchange", world_size=3)
    expected = {
        "sum": [3.0, 3.0],
        "any": [False, True],
        "gather": [{"rank": r, "text": "ä" * r} for r in range(3)],
        "lead": [0, "only rank 0 runs this"],
        "long": [0, 100_000, 200_000],
        "empty": None,
    }
    assert results == [expected] * 3


def fail(ranks, who):
    def run():
        if ranks.rank in who:
            raise UsageError("optim.lr = 7: too large")
        return "fine"

    try:
        return ranks.each(run)
    except ScaleError as error:
        return [type(error).__name__, str(error), error.exit_code, error.shared]


def test_an_error_on_one_rank_ends_all_and_is_told_once():
    first, second = run_ranks("tests.distributed.test_ranks:fail", who=[1])
    assert second == ["UsageError", "optim.lr = 7: too large", 2, False]
    assert first == ["Elsewhere", "rank 1: optim.lr = 7: too large", 2, False]


def test_the_same_error_everywhere_is_told_by_the_first_rank_as_shared():
    first, second = run_ranks("tests.distributed.test_ranks:fail", who=[0, 1])
    assert first == ["UsageError", "optim.lr = 7: too large", 2, True]
    assert second[0] == "Elsewhere"


def test_alone_nothing_is_exchanged():
    ranks = Ranks()
    assert ranks.gather(3) == [3] and ranks.lead(lambda: 4) == 4 and not ranks.any(False)
    assert ranks.each(lambda: 5) == 5


def test_an_unusable_environment_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="WORLD_SIZE = 'two'"):
        join("cpu")


def test_a_rendezvous_that_nobody_answers_is_one_line(monkeypatch):
    monkeypatch.setattr("scale.parallel.ranks.RENDEZVOUS_SECONDS", 2)
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 9}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ScaleError, match=r"the 2 ranks did not meet at .*127\.0\.0\.1:9 within 2 s"):
        join("cpu")
