"""DeepSpeed ZeRO in two real processes, against one process that sees all rows."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scale.config.optim import OptimConfig, ScheduleConfig
from scale.config.run import DeepSpeedConfig
from scale.errors import ScaleError, UsageError
from scale.models.build import llama_init
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.parallel.ranks import Ranks
from scale.parallel.single import Single
from scale.parallel.zero import DeepSpeed
from scale.protocols import Group
from scale.train.step import BackwardStepper, StepSettings
from tests.distributed.harness import run_ranks

OPTIM = OptimConfig(lr=0.02, weight_decay=0.1)
STAGES = pytest.mark.parametrize("stage", [2, 3])


def llama(tied=False):
    config = LlamaConfig(vocab_size=61, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, tie_word_embeddings=tied)  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config), llama_init(3, 0.2, 2)


class Rows:
    """Eight rows of the step `drawn`, of which this rank gets every `world_size`-th, two at a time."""

    def __init__(self, rank=0, world_size=1, drawn=0):
        self.rank, self.world_size, self.drawn = rank, world_size, drawn

    def draw(self):
        rng = torch.Generator().manual_seed(self.drawn)
        ids = torch.randint(0, 61, (8, 7), generator=rng)
        targets = torch.where(torch.rand(8, 6, generator=rng) < 0.3, -100, ids[:, 1:])
        position = torch.arange(6).expand(8, 6)
        whole = {"input_ids": ids[:, :-1], "targets": targets, "position_ids": position}
        mine = {name: tensor[self.rank :: self.world_size] for name, tensor in whole.items()}
        self.drawn += 1
        batches = [{n: t[i : i + 2] for n, t in mine.items()} for i in range(0, len(mine["targets"]), 2)]
        return Group(batches, tokens=48)

    def publish(self, version, params):
        pass


def stepper(strategy, tied=False, clip=0.5, made=None):
    model, weights = made or llama(tied)
    objective = CausalLM()
    root = strategy.prepare(Root(model, objective), OPTIM, weights)
    schedule = ScheduleConfig(kind="cosine", warmup=2)
    return BackwardStepper(root, objective, strategy, StepSettings(steps=20, lr=OPTIM.lr, schedule=schedule, clip=clip))


def zero(ranks, stage, precision="fp32", offload=False):
    return DeepSpeed(ranks, DeepSpeedConfig(stage=stage, offload=offload), precision)


def run(made, source, steps):
    return [made.step(source).loss for _ in range(steps)]


def rows_of(ranks, drawn=0):
    return Rows(ranks.rank, ranks.world_size, drawn)


def params(strategy):
    return {name: tensor.clone() for name, tensor in strategy.full_params()}


def train(ranks, stage, tied, offload=False, precision="fp32"):
    made = stepper(zero(ranks, stage, precision, offload), tied)
    first = rows_of(ranks).draw().batches[0]["input_ids"].tolist()
    start = params(made.strategy)
    reports = [made.step(source) for source in [rows_of(ranks)] for _ in range(20)]
    other = stepper(Single(precision=precision), tied)
    same = {name: torch.equal(tensor, start[name]) for name, tensor in other.strategy.full_params()}
    expected = [other.step(source) for source in [Rows()] for _ in range(20)]
    engine = made.root.engine
    return {
        "losses": [r.loss for r in reports],
        "norms": [r.grad_norm for r in reports],
        "expected": [r.loss for r in expected],
        "expected_norms": [r.grad_norm for r in expected],
        "same_start": same,
        "first_rows": first,
        "engine": [type(engine).__name__, engine.zero_optimization_stage(), engine.dp_world_size],
        "optimizer": type(engine.optimizer).__name__,
    }


@STAGES
@pytest.mark.parametrize(("tied", "offload"), [(False, False), (True, True)])
def test_steps_are_those_of_one_process(stage, tied, offload):
    ranks = run_ranks("tests.parallel.test_zero:train", stage=stage, tied=tied, offload=offload)
    assert ranks[0]["losses"] == ranks[1]["losses"] and ranks[0]["norms"] == ranks[1]["norms"]
    assert ranks[0]["first_rows"] != ranks[1]["first_rows"]
    for rank in ranks:
        assert rank["engine"] == ["DeepSpeedEngine", stage, 2]
        assert rank["optimizer"] == {2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}[stage]
        assert len(rank["same_start"]) > 10 and all(rank["same_start"].values())
        assert rank["losses"] == pytest.approx(rank["expected"], rel=1e-5)
        assert rank["norms"] == pytest.approx(rank["expected_norms"], rel=1e-4) and max(rank["norms"]) > 0.5
        assert rank["losses"][-1] < rank["losses"][0] * 0.99
