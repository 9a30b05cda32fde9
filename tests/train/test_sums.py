"""Terms and metrics of ranks that do not name the same, counts that are not what was said, groups without labels."""

from __future__ import annotations

import math

import pytest
import torch

from scale.config.optim import OptimConfig, ScheduleConfig
from scale.config.run import FsdpConfig
from scale.errors import ScaleError
from scale.objectives.root import Root
from scale.parallel.fsdp import Fsdp
from scale.protocols import Group, Loss, Term
from scale.train.step import BackwardStepper, StepSettings
from tests.distributed.harness import run_ranks
from tests.train.parts import Numbers, Squares, network, stepper

LR = 0.01
NAMES = [[["mse", "size"], ["sum", "rows", "late"]], [["mse"], ["rows", "peak", "sum"]]]
"""Of each rank: its terms and its metrics, in its order."""


def data(rank, step):
    """The rows of a rank, other ones in every step."""
    rng = torch.Generator().manual_seed(100 * rank + step)
    return {"x": torch.randn(3 + rank, 4, generator=rng), "y": torch.randn(3 + rank, 1, generator=rng)}


class Stream(Numbers):
    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def draw(self):
        self.drawn += 1
        return Group([data(self.rank, self.drawn)], tokens=7)


class Odd:
    """Terms and metrics of a rank, in its order; the metric `late` is there from the second step on."""

    def __init__(self, terms, metrics):
        self.terms, self.metrics, self.calls = terms, metrics, 0

    def counts(self, batch):
        return {name: torch.tensor(len(batch["x"]) * (2 if name == "size" else 1)) for name in self.terms}

    def __call__(self, model, batch):
        self.calls += 1
        out = model(batch["x"])
        totals = {"mse": (out - batch["y"]).square().sum(), "size": out.abs().sum()}
        counts, rows = self.counts(batch), torch.tensor(len(out))
        seen = {"sum": out.sum(), "rows": 2.0 * rows, "peak": out.max(), "late": out.min()}
        return Loss(
            {name: Term(totals[name], counts[name], weight=0.5 if name == "size" else 1.0) for name in self.terms},
            {name: Term(seen[name], rows) for name in self.metrics if name != "late" or self.calls > 1},
        )


def odd_ranks(ranks):
    """Three steps under FSDP2."""
    objective, strategy = Odd(*NAMES[ranks.rank]), Fsdp(ranks, FsdpConfig())
    optim = OptimConfig(lr=LR, weight_decay=0.0)
    root = strategy.prepare(Root(network(), objective), optim, None)
    settings = StepSettings(steps=9, lr=LR, schedule=ScheduleConfig(kind="constant", warmup=0), clip=0.0)
    made, source = BackwardStepper(root, objective, strategy, settings), Stream(ranks.rank)
    gathers, gather = [], ranks.gather
    ranks.gather = lambda value: gathers.append(value) or gather(value)
    reports = [made.step(source) for _ in range(3)]
    return {"loss": [r.loss for r in reports], "metrics": [r.metrics for r in reports], "gathers": len(gathers)} | {
        name: refused(ranks, made, name) for name in ("miscounted", "idle", "unlabelled")
    }


def refused(ranks, made, how):
    """The line that a step ends with, where something is wrong on rank 1 alone."""
    group, objective = Group([data(ranks.rank, 9)], tokens=7), Squares()
    if how == "idle" and ranks.rank == 1:
        group.batches.clear()
    if how == "miscounted" and ranks.rank == 1:
        objective.counts = lambda batch: {"mse": torch.tensor(1)}
    if how == "unlabelled":
        objective.counts = lambda batch: {"mse": torch.tensor(0)}
    made.objective = made.counts.objective = made.root.objective = objective
    try:
        made.score(group) if how == "unlabelled" else made._gradients(group).read()
    except ScaleError as error:
        made.strategy.discard()
        return str(error)


def reference():
    """The same on one device in plain torch, from the sums of both ranks by name."""
    net, found = network(), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for step in (1, 2, 3):
        batches = [data(rank, step) for rank in (0, 1)]
        outs = [net(b["x"]) for b in batches]
        mse = sum((o - b["y"]).square().sum() for o, b in zip(outs, batches, strict=True)) / 7
        loss = mse + 0.5 * outs[0].abs().sum() / 6
        metrics = {"peak": outs[1].max() / 4, "rows": 2.0, "sum": (outs[0].sum() + outs[1].sum()) / 7}
        metrics |= {"late": outs[0].min() / 3} if step > 1 else {}
        found.append((loss.item(), {name: torch.as_tensor(value).item() for name, value in metrics.items()}))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


@pytest.fixture(scope="module")
def two():
    return run_ranks("tests.train.test_sums:odd_ranks")


def test_terms_and_metrics_are_added_up_by_name_over_ranks(two):
    for rank in two:
        for (loss, metrics), ours, theirs in zip(reference(), rank["loss"], rank["metrics"], strict=True):
            assert ours == pytest.approx(loss, rel=1e-5)
            assert theirs == pytest.approx(metrics, rel=1e-5, abs=1e-6) and list(theirs) == sorted(metrics)


def test_names_are_exchanged_when_they_change_alone(two):
    assert [rank["gathers"] for rank in two] == [3, 3], "terms once, metrics in the first and in the second step"


def test_a_fault_of_one_rank_is_the_same_line_on_both(two):
    assert two[0]["miscounted"] == two[1]["miscounted"]
    assert "counts() gives 4 for 'mse', its terms count 7" in two[0]["miscounted"]
    assert two[0]["idle"] == two[1]["idle"] and "1 of 2 ranks drew no micro-batch" in two[0]["idle"]
    assert two[0]["unlabelled"] == two[1]["unlabelled"]
    assert two[0]["unlabelled"] == "nothing to score: mse, size count 0 (are all labels masked?)"


class Terms(Squares):
    """An objective that says these counts, and whose terms count what they count."""

    def __init__(self, **counts):
        self.said = counts

    def counts(self, batch):
        return {name: torch.tensor(count) for name, count in self.said.items()}


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({"mse": 15}, "counts() gives 15 for 'mse', its terms count 16"),
        ({"mse": 16, "kl": 4}, "counts() gives 4 for 'kl', its terms count 0"),
        ({"nll": 16}, "its loss has the term 'mse', but counts() gives only nll"),
        ({"mse": math.nan}, "counts() gives nan for 'mse'"),
        ({"mse": -1}, "counts() gives -1 for 'mse'"),
    ],
)
def test_counts_that_are_not_those_of_the_terms_are_refused(counts, line):
    """In a step, in a score, and in the dry run before step 1, whose loss nobody else reads."""

    class Rehearsed(Numbers):
        def rehearse(self):
            return self.draw()

    made = stepper(objective=Terms(**counts))
    for run in (made.step, lambda source: made.score(source.draw()), made.rehearse):
        before = [p.detach().clone() for p in made.root.parameters()]
        with pytest.raises(ScaleError) as told:
            run(Rehearsed())
        assert line in str(told.value) and "\n" not in str(told.value)
        assert all(torch.equal(a, b) for a, b in zip(before, made.root.parameters(), strict=True)), "nothing applied"
        made.strategy.discard()


def test_a_count_below_one_is_a_denominator_as_well():
    """Weights that add up to a half: the loss is their mean, not half of it."""

    class Weighted(Squares):
        def counts(self, batch):
            return {"mse": 0.5 * torch.tensor(float(batch["y"].numel())) / 16}

        def __call__(self, model, batch):
            loss = super().__call__(model, batch)
            share = loss.terms["mse"].count * 0.5 / 16
            return Loss({"mse": Term(loss.terms["mse"].total / 32, share)}, {"m": Term(torch.tensor(1.0), share)})

    plain, weighted = stepper(), stepper(objective=Weighted())
    report = weighted.step(Numbers())
    assert report.loss == pytest.approx(plain.step(Numbers()).loss, rel=1e-6)
    assert report.metrics == {"m": pytest.approx(2.0)}


def test_a_metric_that_counts_nothing_has_no_value():
    class Silent(Squares):
        def __call__(self, model, batch):
            loss = super().__call__(model, batch)
            return Loss(loss.terms, loss.metrics | {"accuracy": Term(torch.tensor(0.0), torch.tensor(0))})

    assert list(stepper(objective=Silent()).step(Numbers()).metrics) == ["mean"]


def test_micro_batches_may_name_terms_in_any_order_or_lack_one():
    class Mixed(Squares):
        def counts(self, batch):
            count, pair = torch.tensor(len(batch["x"])), torch.tensor(2 * len(batch["x"]))
            return {"mse": count} if batch["x"][0, 0] > 0 else {"l1": pair, "mse": count}

        def __call__(self, model, batch):
            out, counts = model(batch["x"]), self.counts(batch)
            totals = {"mse": (out - batch["y"]).square().sum(), "l1": (out - batch["y"]).abs().sum()}
            return Loss({name: Term(totals[name], count) for name, count in counts.items()})

    made, batch = stepper(objective=Mixed()), Numbers(16).draw().batches[0]
    report = made.step(Numbers(16, micro=2))
    with torch.no_grad():
        off = network()(batch["x"]) - batch["y"]
    second = torch.tensor([batch["x"][i - i % 2, 0] <= 0 for i in range(16)])
    assert second.any() and not second.all()
    expected = off.square().mean() + off[second].abs().sum() / (2 * second.sum())
    assert report.loss == pytest.approx(float(expected), rel=1e-5)


def test_a_group_without_micro_batches_teaches_nothing():
    class Empty(Numbers):
        def draw(self):
            return Group([], tokens=5)

    report = stepper().step(Empty())
    assert (report.kind, report.tokens) == ("skipped", 0) and "no batch" in report.skipped
