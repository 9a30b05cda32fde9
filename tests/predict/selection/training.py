"""A tiny model that learns from a source that selects."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scale.config.optim import OptimConfig, ScheduleConfig, SpikeConfig
from scale.config.predict import SelectionConfig
from scale.data.planner import Planner
from scale.data.rows import RowReader
from scale.data.source import PackedSource
from scale.evaluate.held_out import HeldOut
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.parallel.ranks import Ranks
from scale.parallel.single import Single
from scale.predict.selection.probe import ForwardProbe
from scale.predict.selection.selector import make_selector
from scale.train.step import BackwardStepper, StepSettings
from tests.data.test_rows import InMemory


def model(vocabulary=100, hidden=16, layers=1):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1, attn_implementation="sdpa",
    ))  # fmt: skip


def half_trivial(documents=512, length=33, seed=0, vocabulary=256):
    """Every second document repeats one token; the others follow a grammar: one of two tokens after each."""
    rng = np.random.default_rng(seed)
    after = np.random.default_rng(99).integers(2, vocabulary, (vocabulary, 2))
    docs = []
    for i in range(documents):
        ids = [1 if i % 2 else int(rng.integers(2, vocabulary))]
        while len(ids) < length:
            ids.append(1 if i % 2 else int(after[ids[-1], int(rng.random() < 0.1)]))
        docs.append(ids)
    return InMemory(docs)


def run(steps, every, seed=0, lr=1e-3, **config):
    """Held-out loss after every so many steps, and the source at the end."""
    train, valid = half_trivial(), half_trivial(64, seed=1)
    planner = Planner([train.lengths], [1.0], 16 * 32, lambda _: 32, 32, seed=seed)
    planner.selector = make_selector(SelectionConfig(**({"warmup": 0} | config)), planner.documents, 0, Ranks())
    source = PackedSource(planner, RowReader([train]), ["all"], 16 * 32, [32])
    strategy = Single("cpu")
    objective = CausalLM(per_document=planner.selector is not None)
    root = strategy.prepare(Root(model(256, 32), objective), OptimConfig(lr=lr), None)
    schedule = ScheduleConfig(kind="constant", warmup=0)
    stepper = BackwardStepper(
        root, objective, strategy, StepSettings(steps=steps, lr=lr, schedule=schedule, spike=SpikeConfig())
    )
    if planner.selector is not None:
        planner.selector.probe = ForwardProbe(root, strategy, RowReader([train]), 32, 16)
    judge = HeldOut(root, strategy, [valid], ["all"], [1.0], 10**6, 32, 32)
    scores = []
    for number in range(1, steps + 1):
        stepper.step(source)
        if number % every == 0:
            scores.append(judge.score().loss)
    return scores, source


def probe_of(ranks, documents):
    """Losses of 45 spans by a fresh model, and the parts to check them with."""
    strategy = Single("cpu")
    strategy.ranks = ranks
    root = strategy.prepare(Root(model(), CausalLM(per_document=True)), None, None)
    root.train()
    probe = ForwardProbe(root, strategy, RowReader(documents), 32, 4)
    planner = Planner([d.lengths for d in documents], [1.0] * len(documents), 256, lambda _: 32, 32)
    spans = [order.span(0, i) for order in planner.orders for i in range(45 // len(documents))]
    return spans, probe(spans), root
