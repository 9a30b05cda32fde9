"""What the ranks of the FSDP2 tests do; results are JSON."""

import hashlib
import weakref

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from scale.config.optim import OptimConfig
from scale.config.run import FsdpConfig
from scale.errors import OutOfMemory
from scale.models.build import materialise, set_recompute
from scale.models.leak import refuse_leaks
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.parallel.fsdp import Fsdp
from scale.parallel.single import Single
from tests.parallel.lm import (
    CLIP,
    VOCAB,
    Rows,
    digests,
    edit,
    lora_model,
    meta_model,
    prepared,
    timeouts,
    train,
    whole_loss,
)  # fmt: skip
from tests.train.parts import Squares, network

STEPS = {"plain": 20}
FEWER = 6
VARIANTS = {
    "plain": {},
    "untied": {"model": {"tie_word_embeddings": False}},
    "step, gathered": {"fsdp": {"reduce": "step", "reshard": False}},
    "copies": {"fsdp": {"shard": 1}},
    "recompute": {"recompute": True},
    "lora": {"lora": True, "optim": {"lr": 1e-2}},
    "muon": {"optim": {"kind": "muon", "lr": 1e-2}},
    "bf16": {"precision": "bf16"},
}


def made(strategy, variant):
    model, weights = lora_model() if variant.get("lora") else meta_model(**variant.get("model", {}))
    if variant.get("recompute"):
        set_recompute(model, 1)
    return prepared(strategy, model, weights, variant.get("optim"))


def on_one_device(name, steps=None):
    variant = VARIANTS[name]
    return train(
        made(Single("cpu", variant.get("precision", "fp32")), variant), Rows(), steps or STEPS.get(name, FEWER)
    )


def on_ranks(ranks, names):
    """In each rank: every variant trained, with what shows that it was really sharded."""
    out = {}
    for name in names:
        variant = VARIANTS[name] | ({"fsdp": {"shard": 2}} if ranks.world_size == 4 else {})
        strategy = Fsdp(ranks, FsdpConfig(**variant.get("fsdp", {})), variant.get("precision", "fp32"))
        stepper, source = made(strategy, variant), Rows(ranks.rank, ranks.world_size)
        calls = []
        first = next(m for n, m in stepper.root.named_modules() if n.endswith("layers.0.self_attn"))
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        out[name] = train(stepper, source, STEPS.get(name, FEWER)) | {
            "calls": len(calls),
            "seen": source.seen[0],
            "wrapped": sorted(type(m).__name__ for m in stepper.root.modules() if isinstance(m, FSDPModule)),
            "held": sum(p.to_local().numel() for p in stepper.root.parameters() if isinstance(p, DTensor)),
            "all": sum(p.numel() for p in stepper.root.parameters()),
            "trained": sorted(n for n in strategy.tensors() if n.startswith("model/")),
            "shards": edit(strategy),
        }
    return out


def all_on_two(ranks, folder):
    """One start of two processes for most tests of this file."""
    out = on_ranks(ranks, list(VARIANTS)) | {"edits": edits(ranks), "fill": fill(ranks)}
    out |= {"whole": save_halfway(ranks, folder), "resumed": continue_from(ranks, folder)}
    out |= {"veto": veto(ranks), "reduced": reduced(ranks)}
    return out | {"timeouts": timeouts(ranks)}


def all_on_four(ranks, folder):
    out = on_ranks(ranks, ["untied", "lora"]) | {"resumed": continue_from(ranks, folder)}
    return out | {"timeouts": timeouts(ranks)}


def edits(ranks):
    """Losses around a change of the masters: after a step, and after a forward pass alone; and after dropped gradients."""
    out = []
    for options in ({}, {"reduce": "step", "reshard": False}):
        strategy = Single() if ranks is None else Fsdp(ranks, FsdpConfig(**options))
        stepper = prepared(strategy, *meta_model())
        out.append(whole_loss(stepper.root))
        edit(strategy)
        out.append(whole_loss(stepper.root))
        source = Rows() if ranks is None else Rows(ranks.rank, ranks.world_size)
        out += train(stepper, source, 1)["loss"]
        edit(strategy)
        out.append(whole_loss(stepper.root))
        with strategy.accumulate(last=False):
            strategy.backward(stepper.root(source.draw().batches[0]).terms["lm"].total)
        strategy.discard()
        out += train(stepper, source, 2)["norm"]
    return out


def save_halfway(ranks, folder):
    strategy = Fsdp(ranks, FsdpConfig())
    stepper, source = prepared(strategy, *meta_model()), Rows(ranks.rank, ranks.world_size)
    train(stepper, source, 4)
    dcp.save(strategy.tensors(), checkpoint_id=folder)
    return train(stepper, source, 4)["loss"]


def continue_from(ranks, folder):
    """Another start, then the saved state: the next four losses."""
    strategy = Single() if ranks is None else Fsdp(ranks, FsdpConfig())
    stepper = prepared(strategy, *meta_model(seed=1))
    whole_loss(stepper.root)  # gathers weights that the restore must replace
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = strategy.blank({name: saved.size for name, saved in metadata.items()})
    dcp.load(tensors, checkpoint_id=folder, no_dist=ranks is None)
    strategy.restore(tensors)
    source = Rows(drawn=4) if ranks is None else Rows(ranks.rank, ranks.world_size, drawn=4)
    return train(stepper, source, 4)["loss"]


def veto(ranks):
    """Hashes of this rank's weights and moments around a step that is refused, and after the one that follows."""
    out = {}
    for kind in ("adamw", "muon"):
        optim = {"kind": kind, "lr": 1e-2, "weight_decay": 0.1}
        strategy, straight = Fsdp(ranks, FsdpConfig()), Fsdp(ranks, FsdpConfig())
        steppers = [prepared(each, *meta_model(), optim) for each in (strategy, straight)]
        for stepper in steppers:
            train(stepper, Rows(ranks.rank, ranks.world_size), 2)
        before, norms, observed = local_digests(strategy), [], []
        steppers[0]._gradients(Rows(ranks.rank, ranks.world_size, drawn=2).draw())
        vetoed = strategy.update(1.0, CLIP, observed.append, lambda norm, norms=norms: norms.append(norm) or "because")
        after = local_digests(strategy)
        for stepper in steppers:
            train(stepper, Rows(ranks.rank, ranks.world_size, drawn=3), 1)
        out[kind] = {
            "skipped": vetoed.skipped, "asked": sum(norms), "observed": len(observed), "before": before, "after": after,
            "stepped": local_digests(strategy), "straight": local_digests(straight),
        }  # fmt: skip
    return out


def local_digests(strategy):
    tensors = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in strategy.tensors().items()}
    return {n: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for n, t in tensors.items() if t.numel()}


def reduced(ranks):
    """Largest relative distance of bf16 gradients from the sum in fp32 of what each rank computes by itself in bf16; and how
    far a sum in bf16 is from it."""
    batch = Rows(ranks.rank, ranks.world_size).draw().batches[0]
    model, weights = meta_model()
    materialise(model, weights, torch.device("cpu"))
    for param in model.parameters():
        param.data = param.data.bfloat16()
    Root(model, CausalLM())(batch).terms["lm"].total.backward()
    parts = {name: param.grad for name, param in model.named_parameters()}
    exact = {name: ranks.all_sum(grad.float()) for name, grad in parts.items()}
    low = {name: ranks.all_sum(grad).float() for name, grad in parts.items()}
    strategy, seen = Fsdp(ranks, FsdpConfig(), "bf16"), {}
    root = strategy.prepare(Root(meta_model()[0], CausalLM()), OptimConfig(), weights)
    with strategy.accumulate(last=True):
        strategy.backward(root(batch).terms["lm"].total)

    def observe(shards):
        for name, shard in shards.items():
            rows = slice(shard.offset, shard.offset + len(shard.grad))
            for key, grad in (("away", shard.grad), ("away in bf16", low[name][rows])):
                far = (grad - exact[name][rows]).norm() / exact[name][rows].norm()
                seen[key] = max(seen.get(key, 0.0), far.item())

    strategy.update(1.0, 0.0, observe, None)
    return seen


def fill(ranks):
    """Initial values, and the most that was whole at once while they were made."""
    model, weights = meta_model(hidden_size=64)
    alive, most = [], 0

    def watched(name, shape):
        nonlocal most
        most = max(most, sum(t() is not None for t in alive) + 1)
        value = weights(name, shape)
        alive.append(weakref.ref(value))
        return value

    strategy = Fsdp(ranks, FsdpConfig())
    root = strategy.prepare(Root(model, Squares()), OptimConfig(), watched)
    held = sum(p.to_local().untyped_storage().nbytes() for p in root.parameters())
    return {
        "digests": digests(strategy), "whole at once": most, "held": held,
        "all": 4 * sum(p.numel() for p in root.parameters()),
    }  # fmt: skip


def on_one_rank(ranks):
    """A process group of one: a frozen reference beside a trained model, the leak probe, a module without layers."""
    model, weights = meta_model()
    strategy = Fsdp(ranks, FsdpConfig())
    reference = strategy.prepare(Root(model, Squares()), None, weights)
    stepper = prepared(strategy, *meta_model())
    refuse_leaks(stepper.root, VOCAB)
    plain = Fsdp(ranks, FsdpConfig(), "bf16")
    root = plain.prepare(Root(network(), Squares()), OptimConfig(), None)
    with plain.accumulate(last=True):
        out = root({"x": torch.ones(2, 4), "y": torch.ones(2, 1)})
        plain.backward(out.terms["mse"].total)
    norm = plain.update(1.0, 1.0, None, lambda norm: "because").grad_norm
    found = {"reset": hasattr(FSDPModule, "reset_iter_state"), "short of memory": short_of_memory(ranks)}
    if found["reset"]:
        reset, found["repeated"] = FSDPModule.reset_iter_state, found["short of memory"]
        del FSDPModule.reset_iter_state  # as before torch 2.13
        found["short of memory"] = short_of_memory(ranks)
        FSDPModule.reset_iter_state = reset
    return found | {
        "reference": [reference.training, any(p.requires_grad for p in reference.parameters())],
        "loss": train(stepper, Rows(ranks.rank, ranks.world_size), 2)["loss"],
        "norm": norm,
    }


def short_of_memory(ranks):
    """Losses of two steps, the first of which runs out of memory in the second layer with two rows; or the error."""
    stepper = prepared(Fsdp(ranks, FsdpConfig()), *meta_model())

    def once(layer, given):
        if len(given[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    stepper.root.model.model.layers[1].register_forward_pre_hook(once)
    try:
        return train(stepper, Rows(ranks.rank, ranks.world_size), 2)["loss"]
    except OutOfMemory as error:
        return str(error)


def compiled(ranks):
    out = {}
    for mode in ("off", "default"):
        for recompute in (False, True):
            model, weights = meta_model()
            if recompute:
                set_recompute(model, 1)
            stepper = prepared(Fsdp(ranks, FsdpConfig(), compile=mode), model, weights)
            torch._dynamo.utils.counters.clear()
            out[f"{mode} {recompute}"] = train(stepper, Rows(ranks.rank, ranks.world_size), 5)["loss"]
            out[f"{mode} {recompute} graphs"] = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    return out
