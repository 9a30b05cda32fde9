"""FSDP2 in real processes against one device."""

import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from scale.config.optim import OptimConfig
from scale.config.run import FsdpConfig
from scale.errors import UsageError
from scale.models.build import set_recompute
from scale.models.leak import refuse_leaks
from scale.objectives.root import Root
from scale.parallel.fsdp import Fsdp
from scale.parallel.ranks import Ranks
from scale.parallel.single import Single
from tests.distributed.harness import run_ranks
from tests.parallel.lm import (
    VOCAB,
    Rows,
    digests,
    edit,
    lora_model,
    meta_model,
    prepared,
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


def all_on_two(ranks):
    """One start of two processes for most tests of this file."""
    return on_ranks(ranks, list(VARIANTS)) | {"edits": edits(ranks), "fill": fill(ranks)}


@pytest.fixture(scope="module")
def ran():
    return run_ranks("tests.parallel.test_fsdp:all_on_two", 2)


@pytest.fixture(scope="module")
def two(ran):
    return [{name: rank[name] for name in VARIANTS} for rank in ran]


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("muon", "bf16")])
def test_losses_and_norms_are_those_of_one_device(two, name):
    single = on_one_device(name)
    for rank in two:
        got = rank[name]
        assert got["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert got["norm"] == pytest.approx(single["norm"], rel=1e-4)
        assert all(a == pytest.approx(b, rel=1e-3) for a, b in zip(got["layers"], single["layers"], strict=True))
    assert two[0][name]["loss"] == two[1][name]["loss"] and two[0][name]["norm"] == two[1][name]["norm"]
    assert min(single["norm"]) > 0.3 or name == "lora", "clipping was not active"


def test_the_runs_were_really_sharded_over_different_rows(two):
    for name, got in two[0].items():
        assert got["wrapped"] == ["FSDPLlamaDecoderLayer"] * 3 + ["FSDPRoot"]
        assert not [row for row in got["seen"] if row in two[1][name]["seen"]] and len(got["seen"]) == 6
        held = got["held"] + two[1][name]["held"]
        assert held == got["all"] * (2 if name == "copies" else 1)
        assert abs(got["held"] - held / 2) < 0.05 * held


def test_every_rank_knows_every_trained_name_and_its_rows(two):
    for name, got in two[0].items():
        assert got["shards"].keys() == two[1][name]["shards"].keys() == {n[6:] for n in got["trained"]}
        for param, (shape, offset, rows, copies) in got["shards"].items():
            other = two[1][name]["shards"][param]
            if name == "copies":
                assert other == [shape, 0, shape[0], 2] == [shape, offset, rows, copies]
            else:
                assert (offset, rows + other[2], other[1], copies) == (0, shape[0], rows, 1)
    embedding = two[0]["plain"]["shards"]["model.embed_tokens.weight"]
    assert embedding == [[VOCAB, 32], 0, 51, 1]
    assert 0 in [rows for _, _, rows, _ in two[1]["lora"]["shards"].values()]


def test_lora_trains_adapters_alone(two):
    assert two[0]["lora"]["trained"] and all("lora_" in name for name in two[0]["lora"]["trained"])


def test_recompute_computes_twice_and_changes_nothing(two):
    for rank in two:
        for field in ("loss", "norm", "layers"):
            assert rank["recompute"][field] == rank["plain"][field][:FEWER]
        assert rank["recompute"]["calls"] == 2 * 3 * FEWER and rank["untied"]["calls"] == 3 * FEWER


def test_muon_orthogonalises_whole_matrices(two):
    """Newton-Schulz runs in bf16: close, not equal."""
    single = on_one_device("muon")
    assert two[0]["muon"]["loss"] == pytest.approx(single["loss"], rel=2e-3)
    assert two[0]["muon"]["loss"][-1] < two[0]["muon"]["loss"][0] - 0.1


def test_bf16_follows_one_device(two):
    single = on_one_device("bf16")
    assert two[0]["bf16"]["loss"] == pytest.approx(single["loss"], rel=1e-2)
    assert two[0]["bf16"]["loss"] != pytest.approx(two[0]["plain"]["loss"][:FEWER], rel=1e-5)


def test_copies_of_shards_on_four_ranks_are_like_one_device():
    four = run_ranks("tests.parallel.test_fsdp:on_ranks", 4, names=["untied", "lora"])
    for name in ("untied", "lora"):
        single = on_one_device(name)
        for rank in four:
            assert rank[name]["loss"] == pytest.approx(single["loss"], rel=1e-5)
            assert rank[name]["norm"] == pytest.approx(single["norm"], rel=1e-4)
            assert all(copies == 2 for *_, copies in rank[name]["shards"].values())
        assert len({str(rank[name]["loss"]) for rank in four}) == 1
        assert abs(four[3]["untied"]["held"] - four[3]["untied"]["all"] / 2) < 0.05 * four[3]["untied"]["all"]


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


def test_edited_masters_change_the_next_forward_as_on_one_device(ran):
    single = edits(None)
    for losses in (rank["edits"] for rank in ran):
        assert losses[:2] == single[:2] and losses[7:9] == single[7:9]  # not even rounding differs before a step
        assert losses == pytest.approx(single, rel=1e-5)
    assert abs(single[0] - single[1]) > 1 and abs(single[2] - single[3]) > 1


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


def test_a_saved_state_goes_on_exactly_here_and_nearly_on_other_ranks(tmp_path):
    expected = run_ranks("tests.parallel.test_fsdp:save_halfway", 2, folder=str(tmp_path))[0]
    same, three = (run_ranks("tests.parallel.test_fsdp:continue_from", n, folder=str(tmp_path))[0] for n in (2, 3))
    assert same == expected
    assert three == pytest.approx(expected, rel=1e-5)
    assert continue_from(None, str(tmp_path)) == pytest.approx(expected, rel=1e-5)


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


def test_a_model_is_filled_shard_by_shard_with_the_values_of_one_device(ran):
    single = Single()
    model, weights = meta_model(hidden_size=64)
    single.prepare(Root(model, Squares()), OptimConfig(), weights)
    for rank in (rank["fill"] for rank in ran):
        assert rank["digests"] == digests(single)
        assert rank["whole at once"] <= 2  # the one before is let go as the next arrives
        assert rank["held"] < 0.52 * rank["all"]


def refusals(ranks):
    """Errors that need a process group, a world of one, a reference, and a plain module."""
    leaky, weights = meta_model()
    strategy = Fsdp(ranks, FsdpConfig())
    reference = strategy.prepare(Root(leaky, Squares()), None, weights)
    stepper = prepared(strategy, *meta_model())
    refuse_leaks(stepper.root, VOCAB)
    plain = Fsdp(ranks, FsdpConfig(), "bf16")
    root = plain.prepare(Root(network(), Squares()), OptimConfig(), None)
    with plain.accumulate(last=True):
        out = root({"x": torch.ones(2, 4), "y": torch.ones(2, 1)})
        plain.backward(out.terms["mse"].total)
    norm = plain.update(1.0, 1.0, None, lambda norm: "because").grad_norm
    return {
        "reference": [reference.training, any(p.requires_grad for p in reference.parameters())],
        "loss": train(stepper, Rows(ranks.rank, ranks.world_size), 2)["loss"],
        "norm": norm,
    }


def test_one_rank_needs_no_launcher_and_a_reference_no_optimizer():
    got = run_ranks("tests.parallel.test_fsdp:refusals", 1)[0]
    assert got["reference"] == [False, False] and got["norm"] > 0
    assert got["loss"] == pytest.approx(on_one_device("plain", 2)["loss"], rel=1e-5)


@pytest.mark.parametrize(("options", "message"), [
    ({"shard": 3}, r"compute\.fsdp\.shard = 3: does not divide the 8 ranks"),
    ({"shard": 16}, r"compute\.fsdp\.shard = 16: does not divide the 8 ranks"),
    ({"offload": True}, r"compute\.fsdp\.offload = true: needs an accelerator"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Fsdp(Ranks(0, 8), FsdpConfig(**options))


def test_what_cannot_be_sharded_is_refused_by_name():
    strategy = Fsdp(Ranks(0, 8), FsdpConfig())
    with pytest.raises(UsageError, match=r"optim\.kind = 'adamw8bit'.*adamw or muon"):
        strategy.prepare(Root(network(), Squares()), OptimConfig(kind="adamw8bit"), None)
    model = network()
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(UsageError, match=r"parameter scale is a single number"):
        strategy.prepare(Root(model, Squares()), OptimConfig(), None)


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


@pytest.mark.slow
def test_compiled_layers_train_like_eager_ones():
    for rank in run_ranks("tests.parallel.test_fsdp:compiled", 2, timeout=600):
        assert rank["default False graphs"] > 0 and rank["default True graphs"] > 0 and rank["off True graphs"] == 0
        for recompute in (False, True):
            assert rank[f"default {recompute}"] == pytest.approx(rank["off False"], rel=1e-4)
