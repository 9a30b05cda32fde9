"""FSDP2 in real processes against one device."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from scale.config.optim import OptimConfig
from scale.config.run import FsdpConfig
from scale.errors import UsageError
from scale.objectives.root import Root
from scale.parallel.fsdp import Fsdp
from scale.parallel.ranks import Ranks
from scale.parallel.single import Single
from scale.protocols import Loss, Term
from tests.distributed.harness import run_ranks
from tests.parallel.fsdp_ranks import FEWER, VARIANTS, continue_from, edits, on_one_device
from tests.parallel.lm import VOCAB, check_timeouts, digests, meta_model
from tests.train.parts import Squares, network


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return str(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def ran(saved):
    return run_ranks("tests.parallel.fsdp_ranks:all_on_two", 2, folder=saved)


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


def test_bf16_gradients_are_summed_over_ranks_in_fp32(ran):
    for found in (rank["reduced"] for rank in ran):
        assert found["away"] < 1e-6 and found["away in bf16"] > 1e-4, "a sum in bf16 would not show"


def test_a_veto_leaves_no_trace(ran):
    for kind in ("adamw", "muon"):
        for found in (rank["veto"][kind] for rank in ran):
            assert found["skipped"] == "because" and found["asked"] > 0 and not found["observed"]
            assert found["before"] == found["after"] and len(found["before"]) > 50
            assert not [name for name in found["before"] if found["before"][name] == found["stepped"][name]]
            assert found["stepped"] == found["straight"]


@pytest.mark.slow
def test_copies_of_shards_on_four_ranks_are_like_one_device(ran, saved):
    four = run_ranks("tests.parallel.fsdp_ranks:all_on_four", 4, folder=saved)
    for found in (rank["timeouts"] for rank in four):
        check_timeouts(found)
        assert {size for size, _ in found["before"]} == {2, 4}
    assert four[0]["resumed"] == pytest.approx(ran[0]["whole"], rel=1e-5)
    for name in ("untied", "lora"):
        single = on_one_device(name)
        for rank in four:
            assert rank[name]["loss"] == pytest.approx(single["loss"], rel=1e-5)
            assert rank[name]["norm"] == pytest.approx(single["norm"], rel=1e-4)
            assert all(copies == 2 for *_, copies in rank[name]["shards"].values())
        assert len({str(rank[name]["loss"]) for rank in four}) == 1
        assert abs(four[3]["untied"]["held"] - four[3]["untied"]["all"] / 2) < 0.05 * four[3]["untied"]["all"]


def test_every_process_group_has_the_timeout_of_the_run(ran):
    for found in (rank["timeouts"] for rank in ran):
        check_timeouts(found)
        assert {size for size, _ in found["before"]} == {1, 2}  # copies of one shard: a mesh with groups of its own


def test_edited_masters_change_the_next_forward_as_on_one_device(ran):
    single = edits(None)
    for losses in (rank["edits"] for rank in ran):
        assert losses[:2] == single[:2] and losses[7:9] == single[7:9]  # not even rounding differs before a step
        assert losses == pytest.approx(single, rel=1e-5)
    assert abs(single[0] - single[1]) > 1 and abs(single[2] - single[3]) > 1


def test_a_saved_state_goes_on_exactly_here_and_nearly_on_one_device(ran, saved):
    whole = ran[0]["whole"]
    assert ran[0]["resumed"] == ran[1]["resumed"] == whole
    assert continue_from(None, saved) == pytest.approx(whole, rel=1e-5)


def test_a_model_is_filled_shard_by_shard_with_the_values_of_one_device(ran):
    single = Single()
    model, weights = meta_model(hidden_size=64)
    single.prepare(Root(model, Squares()), OptimConfig(), weights)
    for rank in (rank["fill"] for rank in ran):
        assert rank["digests"] == digests(single)
        assert rank["whole at once"] <= 2  # the one before is let go as the next arrives
        assert rank["held"] < 0.52 * rank["all"]


def test_one_rank_needs_no_launcher_and_a_reference_no_optimizer():
    got = run_ranks("tests.parallel.fsdp_ranks:on_one_rank", 1)[0]
    assert got["reference"] == [False, False] and got["norm"] > 0
    right = pytest.approx(on_one_device("plain", 2)["loss"], rel=1e-5)
    assert got["loss"] == right
    if got["reset"]:
        assert got["repeated"] == right
    assert "cannot take up FSDP again" in got["short of memory"], "a pass that broke off went on with half-used hooks"


def test_hooks_find_the_tensors_of_a_loss():
    """FSDP's, before torch 2.13, look for them as a pytree."""
    total, count = torch.ones(()), torch.ones(())
    assert [*tree_leaves(Loss({"lm": Term(total, count)}))][:2] == [total, count]


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
    offloading = Fsdp(Ranks(0, 8, device="cuda"), FsdpConfig(offload=True))
    with pytest.raises(UsageError, match=r"optim\.kind = 'muon': with compute\.fsdp\.offload=true .*\(use adamw"):
        offloading.prepare(Root(network(), Squares()), OptimConfig(kind="muon"), None)
    model = network()
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(UsageError, match=r"parameter scale is a single number"):
        strategy.prepare(Root(model, Squares()), OptimConfig(), None)


@pytest.mark.slow
def test_compiled_layers_train_like_eager_ones():
    for rank in run_ranks("tests.parallel.fsdp_ranks:compiled", 2, timeout=600):
        assert rank["default False graphs"] > 0 and rank["default True graphs"] > 0 and rank["off True graphs"] == 0
        for recompute in (False, True):
            assert rank[f"default {recompute}"] == pytest.approx(rank["off False"], rel=1e-4)
