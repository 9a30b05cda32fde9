"""What two real processes do for test_zero.py. Results are JSON: numbers, names and verdicts."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from scale.config.optim import OptimConfig, ScheduleConfig
from scale.config.run import DeepSpeedConfig, FsdpConfig
from scale.models.build import llama_init, materialise, set_recompute
from scale.models.heads import decoder_and_head
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.objectives.vocabulary import chunked_loss
from scale.parallel.fsdp import Fsdp
from scale.parallel.single import Single
from scale.parallel.zero import DeepSpeed
from scale.protocols import Group, Loss, Term
from scale.train.step import BackwardStepper, StepSettings

OPTIM = OptimConfig(lr=0.02, weight_decay=0.1)


def llama(tied=False):
    """Odd sizes, which two ranks cannot halve."""
    config = LlamaConfig(vocab_size=61, hidden_size=13, intermediate_size=21, num_hidden_layers=2, num_attention_heads=1,
                         num_key_value_heads=1, head_dim=6, tie_word_embeddings=tied)  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config), llama_init(3, 0.2, 2)


def lora():
    model, weights = llama()
    materialise(model, weights, torch.device("cpu"))
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)), None


class Chunked(CausalLM):
    """The head called again and again on a few tokens, as a large vocabulary asks for."""

    def __call__(self, model, batch):
        decoder, head = decoder_and_head(model)
        hidden = decoder(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        targets = batch["targets"].flatten()
        losses = chunked_loss(hidden.last_hidden_state.flatten(0, 1), head, targets, size=5)
        return Loss({"lm": Term(losses.sum(), self.counts(batch)["lm"])})


class Rows:
    """Eight rows of the step `drawn`, of which this rank gets every `world_size`-th, two at a time."""

    def __init__(self, rank=0, world_size=1, drawn=0):
        self.rank, self.world_size, self.drawn = rank, world_size, drawn

    def draw(self):
        rng = torch.Generator().manual_seed(self.drawn)
        ids = torch.randint(0, 61, (8, 7), generator=rng)
        targets = torch.where(torch.rand(8, 6, generator=rng) < 0.3, -100, ids[:, 1:])
        whole = {"input_ids": ids[:, :-1], "targets": targets, "position_ids": torch.arange(6).expand(8, 6)}
        mine = {name: tensor[self.rank :: self.world_size] for name, tensor in whole.items()}
        self.drawn += 1
        batches = [{n: t[i : i + 2] for n, t in mine.items()} for i in range(0, len(mine["targets"]), 2)]
        return Group(batches, tokens=48)

    def publish(self, version, params):
        pass


def stepper(strategy, made=None, objective=None, optim=OPTIM):
    model, weights = made or llama()
    objective = objective or CausalLM()
    root = strategy.prepare(Root(model, objective), optim, weights)
    schedule = ScheduleConfig(kind="cosine", warmup=2)
    return BackwardStepper(root, objective, strategy, StepSettings(steps=20, lr=optim.lr, schedule=schedule, clip=0.5))


def rows(ranks, drawn=0):
    return Rows(ranks.rank, ranks.world_size, drawn)


def run(made, source, steps):
    return [made.step(source).loss for _ in range(steps)]


def params(strategy):
    return {name: tensor.clone() for name, tensor in strategy.full_params()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loss_of(made):
    with torch.no_grad():
        return made.root(Rows().draw().batches[0]).terms["lm"].total.item()


def train(strategy, ranks):
    made = stepper(strategy)
    start = params(strategy)
    source, reports = rows(ranks), []
    first = source.draw().batches[0]["input_ids"].tolist()
    source.drawn = 0
    reports = [made.step(source) for _ in range(20)]
    other = stepper(Single())
    same_start, source = same(start, params(other.strategy)), Rows()
    expected = [other.step(source) for _ in range(20)]
    engine = made.root.engine
    return {
        "losses": [r.loss for r in reports],
        "norms": [r.grad_norm for r in reports],
        "expected": [r.loss for r in expected],
        "expected_norms": [r.grad_norm for r in expected],
        "same_start": same_start,
        "first_rows": first,
        "engine": [type(engine).__name__, engine.zero_optimization_stage(), engine.dp_world_size],
        "optimizer": type(engine.optimizer).__name__,
    }


def few_steps(strategy, ranks, made, objective=None):
    """Losses of four steps beside those of one process."""
    return [
        run(stepper(strategy, made(), objective), rows(ranks), 4),
        run(stepper(Single(), made(), objective), Rows(), 4),
    ]


def four(ranks):
    """ZeRO-3 on more ranks than parameters have pieces of a round size."""
    made, other, source, whole = (
        stepper(DeepSpeed(ranks, DeepSpeedConfig(stage=3))),
        stepper(Single()),
        rows(ranks),
        Rows(),
    )
    reports = [[made.step(source), other.step(whole)] for _ in range(3)]
    ends = params(made.strategy), params(other.strategy)
    return {
        "losses": [[report.loss for report in pair] for pair in reports],
        "norms": [[report.grad_norm for report in pair] for pair in reports],
        "apart": max((ends[0][name] - value).abs().max().item() for name, value in ends[1].items()),
        "partitions": made.root.engine.dp_world_size,
    }


def recomputed():
    model, weights = llama(tied=True)
    set_recompute(model, 1)
    return model, weights


def edit(strategy, ranks):
    """Write the same delta into all masters here and in one process."""
    made, other = stepper(strategy), stepper(Single())
    before = [loss_of(made), loss_of(other)]
    covered = {}
    for which in (strategy, other.strategy):
        with which.edit_masters() as shards:
            for name, shard in shards.items():
                numel = shard.param.numel()
                index = shard.offset + torch.arange(numel)
                shard.param.add_(0.01 * torch.cos(index + len(name)).view(shard.param.shape))
                if which is strategy:
                    covered[name] = [shard.offset, numel, torch.Size(shard.global_shape).numel(), shard.flat]
    return {
        "before": before,
        "after": [loss_of(made), loss_of(other)],
        "covered": covered,
        "next": [run(made, rows(ranks), 2), run(other, Rows(), 2)],
    }


def edit_bf16(strategy):
    """Masters begin unrounded, and what is written to them reaches the weights of the next forward."""
    made = stepper(strategy)
    start, exact = params(strategy), params(stepper(Single()).strategy)
    before = loss_of(made)
    with strategy.edit_masters() as shards:
        for shard in shards.values():
            shard.param.mul_(1.05)
    model, weights = llama()
    materialise(model, weights, torch.device("cpu"))
    model.load_state_dict(params(strategy))
    for param in model.parameters():  # not the rotary frequencies
        param.data = param.data.to(torch.bfloat16)
    with torch.no_grad():
        out = CausalLM()(model, Rows().draw().batches[0])
    after = loss_of(made)
    losses = run(made, rows(strategy.ranks), 4)
    return {"exact": same(start, exact), "before": before, "after": after, "rounded": out.terms["lm"].total.item(),
            "losses": losses, "dtypes": sorted({str(p.dtype) for p in made.root.parameters()})}  # fmt: skip


def bf16_beside_fsdp(ranks, stage):
    """Five steps so small that bf16 weights alone would hardly move; how differently the masters moved."""
    out, moved = {}, {}
    for name, make in (
        ("zero", lambda: DeepSpeed(ranks, DeepSpeedConfig(stage=stage), "bf16")),
        ("fsdp", lambda: Fsdp(ranks, FsdpConfig(), "bf16")),
    ):
        made = stepper(make(), optim=OptimConfig(lr=1e-4, weight_decay=0.1))
        start = params(made.strategy)
        source = rows(ranks)
        reports = [made.step(source) for _ in range(5)]
        end = params(made.strategy)
        moved[name] = torch.cat([(end[key] - start[key]).flatten() for key in sorted(end)])
        out[name] = {"losses": [r.loss for r in reports], "norms": [r.grad_norm for r in reports]}
    return out | {"apart": ((moved["zero"] - moved["fsdp"]).norm() / moved["fsdp"].norm()).item()}


def refuse_step(strategy, ranks):
    """A veto in the second step, and half a step thrown away before the third."""
    made, straight = stepper(strategy), stepper(DeepSpeed(ranks, strategy.config))
    run(made, rows(ranks), 1)
    run(straight, rows(ranks), 1)
    before = {**params(strategy), **strategy.tensors()}
    seen = []
    made._gradients(rows(ranks, 1).draw())
    vetoed = strategy.update(1.0, 0.5, seen.append, lambda norm: f"norm {norm > 0}")
    untouched = same(before, {**params(strategy), **strategy.tensors()})
    batch = rows(ranks, 7).draw().batches[0]
    with strategy.accumulate(last=False):
        strategy.backward(made.root(batch).terms["lm"].total)
    strategy.discard()
    norms = {}

    def observe(shards):
        square = sum((shard.grad.double().square().sum() for shard in shards.values()), torch.zeros(()).double())
        norms["clipped"] = ranks.all_sum(square).sqrt().item()
        norms["masters"] = all(s.param.shape == s.grad.shape for s in shards.values())

    made._gradients(rows(ranks, 1).draw())
    update = strategy.update(1.0, 0.1, observe, None)
    straight._gradients(rows(ranks, 1).draw())
    straight.strategy.update(1.0, 0.1, None, None)
    return {"skipped": vetoed.skipped, "observed": len(seen), "untouched": untouched, "norm": update.grad_norm,
            "as_straight": same(params(strategy), params(straight.strategy)), **norms}  # fmt: skip


def placed(strategy, ranks):
    """How many elements of parameters this process holds while a meta model is filled, and between steps."""
    model, weights = llama()
    total, held = sum(p.numel() for p in model.parameters()), []

    def watched(name, shape):
        value = weights(name, shape)
        if name.endswith(("1.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight")):  # a look takes a while
            held.append(_elements() - before)
        return value

    gc.collect()
    before = _elements()
    made = stepper(strategy, (model, watched))
    run(made, rows(ranks), 2)
    return {"total": total, "held": max(held), "largest": 61 * 13,
            "between_steps": sum(p.numel() for p in made.root.parameters())}  # fmt: skip


def _elements():
    tensors = (t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu")
    return sum(t.numel() for t in tensors if t.is_floating_point())


def reference(strategy, ranks):
    """A frozen copy beside the trained model."""
    made = stepper(strategy)
    root = strategy.prepare(Root(llama()[0], CausalLM()), None, llama()[1])
    single = stepper(Single())
    run(made, rows(ranks), 2)
    batch = Rows().draw().batches[0]
    with torch.no_grad():
        return {"loss": root(batch).terms["lm"].total.item(), "expected": loss_of(single), "trained": loss_of(made),
                "training": root.training}  # fmt: skip


def more(ranks, stage, folder):
    """Options: offload, nothing kept whole between steps, bf16, recompute, adapters, a reference."""
    file = Path(folder, f"ds{ranks.rank}.json")
    file.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    cut = DeepSpeedConfig(stage=stage, config=str(file))
    offload = DeepSpeedConfig(stage=stage, offload=True)
    make = lambda config, precision="fp32": DeepSpeed(ranks, config, precision)  # noqa: E731
    return {
        "offload": few_steps(make(offload), ranks, lambda: llama(tied=True)),
        "recomputed": few_steps(make(cut), ranks, recomputed, Chunked()),
        "lora": few_steps(make(cut), ranks, lora),
        "edit_cut": edit(make(cut), ranks),
        "edit_offload": edit(make(offload), ranks),
        "refuse_offload": refuse_step(make(offload), ranks),
        "bf16": edit_bf16(make(DeepSpeedConfig(stage=stage), "bf16")),
        "placed": placed(make(cut), ranks),
        "reference": reference(make(cut), ranks),
    }
