"""Drawing by score and weighting by the inverse probability leaves the gradient as it is, on average."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scale.config.optim import OptimConfig, ScheduleConfig, SpikeConfig
from scale.data import planner as planning
from scale.data.planner import Planner
from scale.data.rows import IGNORE, RowReader, unstack
from scale.data.source import PackedSource
from scale.errors import ScaleError
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.parallel.single import Single
from scale.train.step import BackwardStepper, StepSettings
from tests.data.test_rows import InMemory

RNG = np.random.default_rng(4)
DOCS = InMemory([RNG.integers(0, 6, n) for n in RNG.integers(3, 18, 64)])


class Bigrams(nn.Module):
    """Logits of the next token are a linear function of this one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(np.random.default_rng(0).normal(0, 3, (6, 6))))

    def forward(self, input_ids, position_ids, use_cache):
        return SimpleNamespace(logits=F.one_hot(input_ids, 6).double() @ self.weight)


class ByLoss:
    """Selector: knows the loss of every document under the model (or calls some unseen)."""

    def __init__(self, unbiased, keep=0.25):
        self.kept, self.unbiased = keep, unbiased
        objective, model = CausalLM(per_document=True), Bigrams()
        reader = RowReader([DOCS])
        order = Planner([DOCS.lengths], [1.0], 16, lambda _: 16, 16).orders[0]
        spans = [order.span(0, place) for place in range(order.size)]
        terms = {s: objective(model, reader.batch([[s]], s.length)).terms["lm"] for s in spans}
        self.loss = {s: float(term.total.detach() / term.count) for s, term in terms.items()}

    def keep(self, group):
        return self.kept

    def scores(self, group, spans, pieces_N):
        return np.array([np.inf if s.doc % 13 == 0 else self.loss[s] for s in spans])


def gradient(batches, count):
    model = Bigrams()
    for batch in batches:
        (CausalLM()(model, batch).terms["lm"].total / count).backward()
    return model.weight.grad.flatten().numpy()


def windows(count, selector, monkeypatch):
    """The gradient of the sum over each window of a stream, over the share of positions that a window trains."""
    monkeypatch.setattr(planning, "WINDOW_ROWS", 1)
    lengths = int((DOCS.lengths - 1).sum())
    found = []
    for seed in range(count):
        made = Planner([DOCS.lengths], [1.0], 16, lambda _: 16, 16, seed=seed)
        made.selector, made.taken, made.budget.keep = selector, [lengths], selector.kept
        candidates = [made.orders[0].span(0, place) for place in range(made.orders[0].size)]
        spans, weights = made._chosen(selector, candidates)
        rows = [[span] for span in spans]
        block = RowReader([DOCS]).block(rows, 16, [[w] for w in weights] if selector.unbiased else ())
        found.append(gradient([unstack(block)], selector.kept * lengths))
    return np.array(found)


def deviations(sample, truth):
    """Distance of the mean from the truth in standard errors, over all entries (root mean square)."""
    error = sample.std(0, ddof=1) / np.sqrt(len(sample))
    off = np.abs(sample.mean(0) - truth)
    return float(np.sqrt((off**2).sum() / max((error**2).sum(), 1e-30)))


def plain():
    order = Planner([DOCS.lengths], [1.0], 16, lambda _: 16, 16).orders[0]
    rows = [[order.span(0, place)] for place in range(order.size)]
    return gradient([RowReader([DOCS]).batch(rows, 16)], int((DOCS.lengths - 1).sum()))


def test_the_mean_weighted_gradient_is_the_plain_one(monkeypatch):
    assert deviations(windows(1000, ByLoss(unbiased=True), monkeypatch), plain()) < 3


@pytest.mark.parametrize("how", ["draws without weights", "the best"])
def test_the_control_is_biased(how, monkeypatch):
    """The same draws with every loss counted once, and the highest losses alone."""
    selector = ByLoss(unbiased=how != "the best")
    chosen = Planner._chosen

    def unweighted(self, selector, candidates):
        spans, _ = chosen(self, selector, candidates)
        return spans, [1.0] * len(spans)

    monkeypatch.setattr(Planner, "_chosen", unweighted)
    assert deviations(windows(1000, selector, monkeypatch), plain()) > 5


def test_weights_are_one_on_average_and_bounded(monkeypatch):
    monkeypatch.setattr(planning, "WINDOW_ROWS", 64)
    weights = []
    made = Planner([DOCS.lengths], [1.0], 64, lambda _: 16, 16, seed=1)
    made.selector = ByLoss(unbiased=True)
    for _ in range(400):
        plan = made.next()
        weights += [(w, s.length) for row, ws in zip(plan.rows, plan.weights, strict=True)
                    for s, w in zip(row, ws, strict=True)]  # fmt: skip
    value, length = np.array(weights).T
    assert np.average(value, weights=length) == pytest.approx(1.0, abs=0.03) and value.max() < 5 and value.min() > 0.2


class Once:
    """Source: one group with weights, which notes what it hears."""

    def __init__(self, batches):
        self.batches, self.heard = batches, []

    def draw(self):
        group = PackedSource._group(SimpleNamespace(micro_tokens=16, names=[]), SimpleNamespace(
            seq_len=16, tokens=1, drawn=()), self.batches)  # fmt: skip
        group.hear = self.heard.append
        return group

    def publish(self, version, params):
        pass


@pytest.mark.parametrize("split", [1, 2])
def test_the_stepper_weighs_tokens_keeps_the_count_and_tells_unweighted_losses(split):
    """Against sums in float64 by hand."""
    spans = [Planner([DOCS.lengths], [1.0], 16, lambda _: 16, 16).orders[0].span(0, i) for i in range(4)]
    weights = [0.5, 2.0, 1.0, 4.0]
    source = Once(RowReader([DOCS]).block([[s] for s in spans], 16, [[w] for w in weights]))
    strategy, objective = Single("cpu", precision="fp32"), CausalLM(per_document=True)
    root = strategy.prepare(Root(Bigrams(), objective), OptimConfig(lr=0.1), None)
    settings = StepSettings(10, 0.1, ScheduleConfig(kind="constant", warmup=0), SpikeConfig())
    report = BackwardStepper(root, objective, strategy, settings, split=split).step(source)
    by_hand, model = [], Bigrams()
    for span in spans:
        batch = RowReader([DOCS]).batch([[span]], 16)
        logits = model(batch["input_ids"], None, False).logits[0]
        by_hand.append(
            float(F.cross_entropy(logits, batch["targets"][0], ignore_index=IGNORE, reduction="sum").detach())
        )
    tokens = sum(s.length for s in spans)
    assert report.loss == pytest.approx(np.dot(by_hand, weights) / tokens, rel=1e-5)
    (sums,) = source.heard
    assert torch.cat([part[:, 0] for part in sums]).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_an_objective_that_cannot_tell_documents_apart_is_refused():
    order = Planner([DOCS.lengths], [1.0], 16, lambda _: 16, 16).orders[0]
    source = Once(RowReader([DOCS]).block([[order.span(0, 0)]], 16))
    strategy, objective = Single("cpu", precision="fp32"), CausalLM()
    root = strategy.prepare(Root(Bigrams(), objective), OptimConfig(lr=0.1), None)
    settings = StepSettings(10, 0.1, ScheduleConfig(kind="constant", warmup=0), SpikeConfig())
    with pytest.raises(ScaleError, match="does not tell the losses of documents"):
        BackwardStepper(root, objective, strategy, settings).step(source)
