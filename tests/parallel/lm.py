"""A tiny language model, fixed batches cut over ranks, and a training run over them: the same on one device and on many."""

from __future__ import annotations

import hashlib

import torch
from torch.distributed.distributed_c10d import _world

from scale.config.model import LoraConfig, ModelConfig
from scale.config.optim import OptimConfig, ScheduleConfig, SpikeConfig
from scale.models.adapters import add_adapter
from scale.models.build import build_model, materialise
from scale.models.hf_config import model_config
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.parallel.ranks import FIRST_STEP_SECONDS
from scale.protocols import Group
from scale.train.step import BackwardStepper, StepSettings

VOCAB = 101  # shards of the embedding are uneven
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCAB}  # fmt: skip
CLIP = 0.3
ROWS = 12  # as many for each of 1, 2, 3 or 4 ranks
ADAMW = {"lr": 3e-3}


class Rows:
    """Source: 12 rows per step, unevenly masked, of which rank r of w reads rows r, r + w, ... in micro-batches of two."""

    def __init__(self, rank=0, world_size=1, drawn=0):
        self.rank, self.world_size, self.drawn, self.seen = rank, world_size, drawn, []

    def draw(self):
        rng = torch.Generator().manual_seed(self.drawn)
        self.drawn += 1
        ids = torch.randint(0, VOCAB // 2, (ROWS, 17), generator=rng)
        targets = ids[:, 1:].clone()
        for row, learned in enumerate(torch.randint(3, 17, (ROWS,), generator=rng).tolist()):
            targets[row, learned:] = -100
        batch = {"input_ids": ids[:, :-1], "position_ids": torch.arange(16).expand(ROWS, 16), "targets": targets}
        mine = list(range(self.rank, ROWS, self.world_size))
        self.seen.append(ids[mine].tolist())
        micro = [mine[i : i + 2] for i in range(0, len(mine), 2)]
        return Group([{k: v[rows] for k, v in batch.items()} for rows in micro], tokens=ROWS * 16)

    def publish(self, version, params):
        pass


def meta_model(seed=0, **overrides):
    """A model without memory and its `Weights`; embeddings are tied unless overridden."""
    config = ModelConfig(preset="tiny", overrides=SIZES | {"tie_word_embeddings": True} | overrides)
    return build_model(config, model_config(config, VOCAB), "sdpa", seed)


def lora_model():
    """A filled model with frozen weights and adapters of rank 1, whose shards are empty on all ranks but one."""
    model, weights = meta_model()
    materialise(model, weights, torch.device("cpu"))
    model = add_adapter(model, LoraConfig(kind="lora", rank=1, targets=["q_proj", "down_proj"]), seed=0)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model, None


def prepared(strategy, model, weights, optim=None):
    """A stepper over the model under a strategy."""
    optim = OptimConfig(**(optim or ADAMW))
    root = strategy.prepare(Root(model, CausalLM()), optim, weights)
    settings = StepSettings(
        steps=100, lr=optim.lr, schedule=ScheduleConfig(kind="constant", warmup=0), spike=SpikeConfig(), clip=CLIP,
        layer_gradients=1,
    )  # fmt: skip
    return BackwardStepper(root, CausalLM(), strategy, settings)


def train(stepper, source, steps):
    """Loss, gradient norm and layer norms of each step."""
    reports = [stepper.step(source) for _ in range(steps)]
    return {
        "loss": [report.loss for report in reports],
        "norm": [report.grad_norm for report in reports],
        "layers": [report.layer_gradients for report in reports],
    }


def whole_loss(root, drawn=1000):
    """Forward-only loss of all rows on this rank."""
    group = Rows(drawn=drawn).draw()
    with torch.no_grad():
        return sum(root(batch).terms["lm"].total.item() for batch in group.batches)


def digests(strategy):
    """A hash of each whole parameter."""
    return {n: hashlib.sha256(p.numpy().tobytes()).hexdigest() for n, p in strategy.full_params()}


def delta(name, shape):
    """A change of one parameter that depends on its name alone."""
    rng = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    return 0.05 * torch.randn(shape, generator=rng)


def edit(strategy):
    """Add `delta` to every trained parameter through its shards."""
    with strategy.edit_masters() as shards:
        for name, shard in shards.items():
            shard.param += delta(name, shard.global_shape)[shard.offset : shard.offset + len(shard.param)]
        return {name: [list(s.global_shape), s.offset, len(s.param), s.copies] for name, s in shards.items()}


def timeouts(ranks):
    """Ranks and seconds of every process group, as made and after `set_timeout(77)`; the channel beside comes last."""
    before = _seconds()
    beside = ranks.beside().group
    ranks.set_timeout(77)
    return {"before": before, "after": _seconds(besides=beside), "beside": _seconds_of(beside)}


def check_timeouts(found):
    """The long one before the first step is over, then the one asked for, except beside."""
    assert {seconds for _, seconds in found["before"]} == {FIRST_STEP_SECONDS} == {found["beside"]}
    assert {seconds for _, seconds in found["after"]} == {77}


def _seconds(besides=None):
    return sorted([group.size(), _seconds_of(group)] for group in _world.pg_map if group is not besides)


def _seconds_of(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
