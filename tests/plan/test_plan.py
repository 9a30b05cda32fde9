"""The bill as a whole: numbers by hand, advice that holds, errors that name the fix, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import scale.hardware.choices as hardware_choices
from scale import choices
from scale.cli.main import main
from scale.config import load_config
from scale.plan import plan as planning
from scale.plan.advice import advise
from scale.plan.memory import HELD
from scale.plan.plan import make_plan
from scale.plan.settle import planned

Make = Callable[..., Path]


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 2
    return capsys.readouterr().err


def test_json_adds_up(make_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(make_config()), "--gpus", "4", "--gpu", "h100", "--mfu", "0.5", "--json"]
    assert main(["plan", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"name", "gpus", "gpu", "parameters", "choices", "batch", "memory", "run", "advice"}
    vocabulary = 320
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    total = vocabulary * 32 + 2 * layer + 32
    assert found["parameters"] == {"total": total, "trainable": total, "active": total}
    assert found["choices"]["strategy"] == "fsdp" and found["choices"]["precision"] == "bf16"
    assert found["batch"]["micro"] * found["batch"]["accumulation"] * 4 == found["batch"]["rows"] == 8
    memory, run = found["memory"], found["run"]
    assert memory["peak"] == sum(memory["at_peak"].values()) and memory["fits"] and found["advice"] == []
    matrices = total - 5 * 32
    per_token = 6 * matrices + 12 * 2 * 2 * 16 * 64
    assert run["flops_per_token"] == per_token
    assert run["flops"] == pytest.approx(per_token * 20 * 8 * 64)
    assert run["days"] == pytest.approx(run["flops"] / (4 * 989e12 * 0.5) / 86_400)
    assert run["gpu_hours"] == pytest.approx(run["days"] * 24 * 4)


def test_table_says_what_it_holds(make_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(make_config()), "--gpus", "1", "--gpu", "l4"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "micro-batch", "weights", "activations", "peak", "fits", "traced", "GPU-hours"):
        assert word in out


def test_gpus_that_do_not_divide_the_rows(make_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of(capsys, str(make_config(batch={"sequences": 12})), "--gpus", "5", "--gpu", "h100")
    assert "--gpus 4 or --gpus 6" in text and "batch.sequences=10 or batch.sequences=15" in text


def test_unknown_card_lists_cards(make_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of(capsys, str(make_config()), "--gpus", "1", "--gpu", "h1000")
    assert "h1000" in text and "h100" in text and "4090" in text


@pytest.mark.parametrize(("words", "said"), [
    (["--gpus", "0", "--gpu", "h100"], "--gpus 0"),
    (["--gpus", "1", "--gpu", "h100", "--mfu", "1.5"], "--mfu 1.5"),
    (["--gpus", "1", "--gpu", "v100"], "bf16"),
    (["--gpus", "2", "--gpu", "h100", "compute.strategy=single"], "single"),
])  # fmt: skip
def test_bad_arguments(make_config: Make, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert said in error_of(capsys, str(make_config()), *words)


def test_epochs_need_the_data_and_then_follow_them(make_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_config(train={"epochs": 2})
    assert "train.tokens=" in error_of(capsys, str(path), "--gpus", "1", "--gpu", "h100")
    from scale.build import build_trainer
    from scale.data.prepare import prepare

    config = load_config(path)
    prepare(config.data, progress=False)
    made = make_plan(config, 1, planned("h100"))
    assert made.steps == build_trainer(config).loop.settings.steps
    assert 0.5 < made.fill < 1


def test_advice_names_knobs_that_fit(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of a few MiB: the knobs are real, and a plan made with one says the same peak."""
    config = load_config(make_config(), ["batch.micro=8", "compute.recompute=off", "compute.loss=full"])
    card = planned("h100")
    whole = make_plan(config, 1, card)
    share = 0.6 * whole.memory.peak / card.memory
    monkeypatch.setattr(planning, "USABLE", share)
    refused = make_plan(config, 1, card)
    assert not refused.fits
    knobs = advise(refused)
    fitting = [knob for knob in knobs if knob.fits]
    assert fitting and knobs[0].change.startswith("batch.micro=")
    again = make_plan(
        load_config(make_config(), ["compute.recompute=off", "compute.loss=full", knobs[0].change]), 1, card
    )
    assert again.memory.peak == knobs[0].peak and again.fits == knobs[0].fits


def test_advice_widens_a_shard_rather_than_adding_copies(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks, each with the whole model: half of it on each is enough, and as much as 16 ranks would hold is not."""
    words = ["compute.fsdp.shard=1", "batch.micro=1", "compute.recompute=1"]
    config, card = load_config(make_config(), words), planned("h100")
    whole = make_plan(config, 8, card)
    held = sum(whole.memory.at_peak[name] for name in HELD)
    monkeypatch.setattr(planning, "USABLE", (whole.memory.peak - 0.4 * held) / card.memory)
    knobs = advise(make_plan(config, 8, card))
    assert [(knob.change, knob.fits) for knob in knobs[:2]] == [
        ("compute.fsdp.shard=2", True),
        ("compute.fsdp.shard=all", True),
    ]
    assert not any("--gpus" in knob.change for knob in knobs)
    again = make_plan(load_config(make_config(), [*words[1:], "compute.fsdp.shard=2"]), 8, card)
    assert again.memory.peak == knobs[0].peak


@pytest.mark.parametrize("there", [True, False])
def test_kernels_are_chosen_but_not_put_in_place(
    make_config: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setattr(hardware_choices, "installed", lambda package: there)
    monkeypatch.setattr(choices, "liger_knows", lambda kind: there)
    monkeypatch.setattr(choices, "apply_liger", lambda kind: pytest.fail("patched"))
    asked = make_plan(load_config(make_config(), ["compute.kernels=liger"]), 1, planned("h100")).settled.choices
    assert asked.kernels.value == "liger" and asked.kernels.reason.endswith("; memory is planned without it")
    assert ("not installed" in asked.kernels.reason) is not there
    assert main(["plan", str(make_config()), "--gpus", "1", "--gpu", "h100"]) == 0
    assert ("liger (CUDA" if there else "off (liger-kernel is not installed)") in capsys.readouterr().out


def test_attention_meets_the_precision(make_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(make_config()), "compute.attention=flash_attention_2", "compute.precision=fp32"]
    assert "does not compute in fp32" in error_of(capsys, *words, "--gpus", "1", "--gpu", "h100")


def test_deepspeed_is_computed(make_config: Make) -> None:
    words = ["compute.strategy=deepspeed", "compute.deepspeed.stage=2"]
    made = make_plan(load_config(make_config(), words), 4, planned("h100"))
    total = made.size.total
    assert made.memory.held == {"weights": 2 * total, "gradients": total, "optimizer": 3 * total}
    assert made.memory.method.startswith("computed")


def test_deepspeed_counts_logits_only_where_they_exist(make_config: Make) -> None:
    """Three fp32 values for each of 320 entries of the vocabulary and each token."""
    words = ["compute.strategy=deepspeed", "batch.micro=2"]
    full, chunked = (
        make_plan(load_config(make_config(), [*words, f"compute.loss={loss}"]), 4, planned("h100")).memory
        for loss in ("full", "chunked")
    )
    assert full.at_peak["activations"] - chunked.at_peak["activations"] == 3 * 4 * 320 * 2 * 64


def test_deepspeed_offload_keeps_only_weights(make_config: Make) -> None:
    words = ["compute.strategy=deepspeed", "compute.deepspeed.offload=true"]
    made = make_plan(load_config(make_config(), words), 4, planned("h100"))
    total, memory = made.size.total, made.memory
    assert memory.held == {"weights": 2 * total // 4, "gradients": total, "optimizer": 3 * total}
    assert [memory.at_peak[name] for name in HELD] == [2 * total // 4, 0, 0] and memory.host == 4 * total


@pytest.mark.parametrize(("word", "said"), [
    ("optim.kind=muon", "optim.kind = 'muon': strategy deepspeed"),
    ("optim.kind=adamw8bit", "optim.kind = 'adamw8bit': strategy deepspeed"),
    ("compute.precision=fp8", "compute.precision = 'fp8': strategy deepspeed"),
    ("compute.deepspeed.config=none.json", "none.json"),
])  # fmt: skip
def test_deepspeed_refuses_what_training_refuses(
    make_config: Make, capsys: pytest.CaptureFixture[str], word: str, said: str
) -> None:
    words = [str(make_config()), "--gpus", "4", "--gpu", "h100", "compute.strategy=deepspeed", word]
    assert said in error_of(capsys, *words)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "shard"), [("7b", 1024), ("gpt_oss_20b", 32)])
def test_large_models_on_many_ranks(preset: str, shard: int) -> None:
    """FSDP2 cuts experts by their number: 32 ranks can share them, 1,024 cannot."""
    words = [f"model.preset={preset}", f"compute.fsdp.shard={shard}"]
    made = make_plan(load_config("configs/pretrain/7b.yaml", words), 1024, planned("h100"))
    print(made.to_json()["memory"])
    assert made.memory.held["weights"] == pytest.approx(4 * made.size.total / shard, rel=0.02)
    assert made.fits
