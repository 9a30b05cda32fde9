"""DeepSpeed ZeRO in two real processes, against one process that sees all rows."""

from __future__ import annotations

import math

import pytest

from scale.config.optim import OptimConfig
from scale.config.run import DeepSpeedConfig
from scale.errors import UsageError
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.parallel.ranks import Ranks
from scale.parallel.zero import DeepSpeed
from tests.distributed.harness import run_ranks
from tests.parallel.lm import check_timeouts
from tests.parallel.zero_parts import llama

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module", params=[2, 3])
def core(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("core")
    ranks = run_ranks("tests.parallel.zero_saved:core", timeout=500, stage=request.param, folder=str(folder))
    return request.param, ranks, folder


@pytest.fixture(scope="module", params=[2, 3])
def more(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    ranks = run_ranks("tests.parallel.zero_parts:more", timeout=500, stage=request.param, folder=str(folder))
    return request.param, ranks


def test_steps_are_those_of_one_process(core):
    stage, ranks, _ = core
    one, two = (rank["train"] for rank in ranks)
    assert one["losses"] == two["losses"] and one["norms"] == two["norms"] and one["first_rows"] != two["first_rows"]
    assert one["engine"] == two["engine"] == ["DeepSpeedEngine", stage, 2]
    assert one["optimizer"] == {2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}[stage]
    assert one["same_start"] and two["same_start"]
    assert one["losses"] == pytest.approx(one["expected"], rel=1e-5)
    assert one["norms"] == pytest.approx(one["expected_norms"], rel=1e-4) and max(one["norms"]) > 0.5  # some clipped


def test_bf16_steps_are_those_of_fsdp(core):
    """Without masters hardly a weight would move; a doubled gradient shows in the norm, which Adam does not care for."""
    for found in (rank["bf16"] for rank in core[1]):
        assert found["zero"]["losses"] == pytest.approx(found["fsdp"]["losses"], rel=1e-4)
        assert found["zero"]["norms"] == pytest.approx(found["fsdp"]["norms"], rel=1e-2)
        assert found["apart"] < 0.05 and len(found["zero"]["losses"]) == 5


@pytest.mark.slow
def test_four_ranks_of_stage_3_are_like_one_process():
    for found in run_ranks("tests.parallel.zero_parts:four", 4, timeout=500):
        assert found["partitions"] == 4 and found["apart"] < 1e-4
        assert all(here == pytest.approx(one, rel=1e-5) for here, one in found["losses"])
        assert all(here == pytest.approx(one, rel=1e-4) for here, one in found["norms"])


def test_every_process_group_has_the_timeout_of_the_run(core):
    for found in (rank["timeouts"] for rank in core[1]):
        check_timeouts(found)
        assert [size for size, _ in found["before"]].count(2) > 1, "DeepSpeed made no group of its own"


def check_edit(ranks, names):
    for edit in (rank[name] for rank in ranks for name in names):
        here, expected = edit["after"]
        assert edit["before"][0] == edit["before"][1] and here == expected != edit["before"][0]
        assert edit["next"][0] == pytest.approx(edit["next"][1], rel=1e-5)


def test_edited_masters_change_the_next_loss_as_in_one_process(core):
    _, ranks, _ = core
    check_edit(ranks, ["edit"])
    parts = [rank["edit"]["covered"] for rank in ranks]
    assert parts[0].keys() == parts[1].keys() and len(parts[0]) > 10
    for name, (offset, numel, whole, flat) in parts[0].items():
        runs = sorted([(offset, numel), tuple(parts[1][name][:2])]) if numel else [tuple(parts[1][name][:2])]
        at = 0
        for start, length in (run for run in runs if run[1]):
            assert start == at and flat
            at += length
        assert at == whole, f"{name}: elements missing or twice"


def check_refused(results):
    for found in results:
        assert found["skipped"] == "norm True" and found["observed"] == 0 and found["untouched"]
        assert found["norm"] > 0.1 and found["clipped"] == pytest.approx(0.1, rel=1e-4) and found["masters"]
        assert found["as_straight"], "a veto or a discarded micro-batch left a trace"
    assert results[0]["norm"] == results[1]["norm"]


def test_a_veto_and_a_discarded_half_step_leave_no_trace(core):
    check_refused([rank["refuse"] for rank in core[1]])


def test_a_restored_run_goes_on_bit_for_bit(core):
    for saved in (rank["saved"] for rank in core[1]):
        assert saved["from_start"][0] == saved["from_start"][1]
        assert saved["goes_on"][0] == saved["goes_on"][1] and saved["same_end"]


def test_states_of_one_process_and_of_several_are_the_same(core):
    stage, ranks, folder = core
    saved = ranks[0]["saved"]
    assert saved["names"][0] == saved["names"][1] and saved["dtypes"] == ["torch.float32"]
    assert saved["into_single"] == pytest.approx(saved["single"], rel=1e-5)
    assert saved["from_single"] == pytest.approx(saved["single"], rel=1e-5)
    (alone,) = run_ranks("tests.parallel.zero_saved:alone", world_size=1, stage=stage, folder=str(folder))
    assert alone == pytest.approx(saved["single"], rel=1e-5)


def test_each_tensor_is_whole_on_one_rank_and_ranks_own_about_the_same(core):
    one, two = core[1][0]["saved"]["owned"]
    shared = one.keys() & two.keys()
    assert all(name.endswith("/step") for name in shared) and len(shared) > 10
    sizes = [sum(size for name, size in owned.items() if name not in shared) for owned in (one, two)]
    assert max(sizes) < 1.2 * min(sizes)
    assert [sorted(one), sorted(two)] == [rank["saved"]["blank"] for rank in core[1]]


def test_states_that_do_not_fit_are_refused_by_name(core):
    for rank in core[1]:
        assert rank["saved"]["refused"] == [
            "checkpoint and model differ: only the model has model.norm.weight",
            "model.norm.weight: checkpoint (2, 2), model (13,)",
            "the checkpoint lacks optim/model.norm.weight/exp_avg",
            "the checkpoint holds, beside AdamW's moments of what is trained here, optim/model.norm.weight/momentum_buffer",
            "checkpoint: parameters made different numbers of steps (3, 4); ZeRO counts one",
        ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["offload", "recomputed", "lora"])
def test_other_models_and_options_step_as_one_process(more, name):
    for rank in more[1]:
        here, expected = rank[name]
        assert here == pytest.approx(expected, rel=1e-5) and len(set(here)) == 4


@pytest.mark.slow
def test_masters_are_published_with_offload_and_without_persistent_weights(more):
    check_edit(more[1], ["edit_cut", "edit_offload"])


@pytest.mark.slow
def test_a_veto_with_offload(more):
    check_refused([rank["refuse_offload"] for rank in more[1]])


@pytest.mark.slow
def test_bf16_weights_follow_exact_masters(more):
    for found in (rank["bf16"] for rank in more[1]):
        assert found["exact"] and found["dtypes"] == ["torch.bfloat16"]
        assert found["after"] == found["rounded"] != found["before"]
        assert all(math.isfinite(loss) for loss in found["losses"])


@pytest.mark.slow
def test_stage_3_never_holds_the_whole_model(more):
    stage, ranks = more
    for found in (rank["placed"] for rank in ranks):
        if stage == 3:
            assert found["held"] <= found["total"] / 2 + 2 * found["largest"] < found["total"]
            assert found["between_steps"] == 0
        else:
            assert found["between_steps"] == found["total"]


@pytest.mark.slow
def test_a_frozen_reference_keeps_its_weights_beside_the_trained_model(more):
    for found in (rank["reference"] for rank in more[1]):
        assert found["loss"] == found["expected"] != found["trained"] and not found["training"]


@pytest.mark.parametrize("kind", ["muon", "adamw8bit"])
def test_optimizers_that_need_matrices_or_blocks_are_refused(kind):
    strategy = DeepSpeed(Ranks(), DeepSpeedConfig())
    with pytest.raises(UsageError, match=f"optim.kind = '{kind}': strategy deepspeed"):
        strategy.prepare(Root(llama()[0], CausalLM()), OptimConfig(kind=kind), None)


def test_fp8_is_refused():
    with pytest.raises(UsageError, match=r"compute\.precision = 'fp8'"):
        DeepSpeed(Ranks(), DeepSpeedConfig(), "fp8")
