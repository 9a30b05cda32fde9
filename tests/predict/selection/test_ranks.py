import pytest

from scale.parallel.ranks import Ranks
from tests.distributed.harness import run_ranks
from tests.predict.selection import ranks as program

COUNT = 150


@pytest.mark.parametrize(
    "config", [{"kind": "history"}, {"kind": "regression", "unbiased": True}], ids=["history", "regression"]
)
def test_two_ranks_keep_the_pieces_that_one_keeps(config):
    """Each hears only the losses of its own rows; together they choose as one process that hears all."""
    alone = program.select(Ranks(), 0, COUNT, config)
    first, second = run_ranks("tests.predict.selection.ranks:select", 2, workers=1, count=COUNT, config=config)
    assert first["state"] == second["state"] == alone["state"]
    assert [a + b for a, b in zip(first["rows"], second["rows"], strict=True)] == alone["rows"]


def test_two_ranks_probe_what_one_probes():
    alone = program.probe(Ranks())
    first, second = run_ranks("tests.predict.selection.ranks:probe", 2)
    assert first == second == pytest.approx(alone, rel=1e-5)
