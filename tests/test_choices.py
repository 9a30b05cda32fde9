"""Choices that need the model: attention and kernels it is built with, its loss, FP8 by measurement."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import scale.choices
from scale.choices import Choices, Model, choose_code, choose_strategy, decide, measured_precision, settled
from scale.config import PretrainRun, load_config
from scale.config.run import ComputeConfig
from scale.errors import UsageError
from scale.hardware import Choice, Hardware
from scale.models.build import build_model
from scale.models.fp8_speed import Timing
from scale.models.hf_config import model_config

GIB = 2**30
H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", 79 * GIB, 16, (9, 0), 8)
A100 = Hardware("cuda", "NVIDIA A100-SXM4-80GB", 79 * GIB, 16, (8, 0))
CPU = Hardware("cpu", "some CPU", 16 * GIB, 8)
SINGLE = Choice("single", "one process")
MakeConfig = Callable[..., Path]


def make_model(config: PretrainRun) -> Model:
    hf_config = model_config(config.model, 320)
    return Model(*build_model(config.model, hf_config, "eager", 0), hf_config)


def decided(config: PretrainRun, hardware: Hardware, **options: Any) -> Choices:
    return decide(config, hardware, make_model(config), Choice("sdpa", ""), SINGLE, 1, **options)


def test_a_model_is_built_with_what_its_class_supports(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched: list[str] = []
    monkeypatch.setattr(scale.choices, "apply_liger", patched.append)  # or all later tests had its kernels
    pytest.importorskip("liger_kernel")
    llama = load_config(make_config(data={**_data(make_config), "cross_documents": True}))
    sinks = load_config(make_config(model={"preset": "gpt_oss_20b"}))
    assert [c.value for c in choose_code(llama, H100)] == ["sdpa", "liger"]
    assert [c.value for c in choose_code(sinks, H100)] == ["flex_attention", "liger"]
    assert patched == ["llama", "gpt_oss"]
    assert [c.value for c in choose_code(llama, CPU)] == ["sdpa", "off"]
    assert [c.value for c in choose_code(sinks, CPU)] == ["eager", "off"]
    without = llama.model_copy(update={"compute": _compute(llama, kernels="off")})
    assert choose_code(without, H100)[1] == Choice("off", "asked for")
    assert patched == ["llama", "gpt_oss"]
    with pytest.raises(UsageError, match=r"'sdpa': this model does not support it \(it has: eager, flex_attention\)"):
        choose_code(sinks.model_copy(update={"compute": _compute(sinks, attention="sdpa")}), CPU)


def test_sizes_are_refused_before_liger_is_put_in_place(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale.choices, "apply_liger", lambda kind: pytest.fail("patched"))
    monkeypatch.setattr(scale.choices, "kernels_of", lambda *_: Choice("liger", "as on a GPU"))
    wrong = {"preset": "tiny", "overrides": {"vocab_size": 512, "head_dim": 17}}
    with pytest.raises(UsageError, match=r"model\.overrides"):
        choose_code(load_config(make_config(model=wrong)), H100)


@pytest.mark.slow
def test_liger_patches_the_classes_but_not_the_loss() -> None:
    """For the whole process, hence in one of its own. Nothing runs on the meta device or is traced from then on."""
    code = """if True:
        from transformers.models.llama import modeling_llama as m
        from scale.models.kernels import apply_liger, liger_knows
        before = m.LlamaForCausalLM.forward
        assert liger_knows("llama") and liger_knows("gpt_oss") and not liger_knows("opt")
        apply_liger("llama")
        print(m.LlamaRMSNorm.__name__, m.LlamaMLP.__name__, m.apply_rotary_pos_emb.__name__)
        assert m.LlamaForCausalLM.forward is before
        from scale.config.model import ModelConfig
        from scale.models.build import build_model
        from scale.models.hf_config import model_config
        from scale.models.kernels import has_liger
        assert has_liger(build_model(tiny := ModelConfig(preset="tiny"), model_config(tiny), "sdpa", 0)[0])
        from scale.config import load_config
        from scale.errors import UsageError
        from scale.hardware import Hardware
        from scale.plan.settle import settle
        try:
            settle(load_config("configs/pretrain/100m.yaml"), 1, Hardware.of("h100"))
        except UsageError as error:
            assert "plan before training" in str(error)
        else:
            raise AssertionError("traced")
    """
    pytest.importorskip("liger_kernel")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LigerRMSNorm", "LigerSwiGLUMLP", "liger_rotary_pos_emb"]


def test_large_vocabularies_are_chunked_and_do_not_count_in_the_micro_batch(make_config: MakeConfig) -> None:
    """100m has 12 x 50,304 bytes of logits a token, which the micro-batch need not leave room for."""
    batch = {"sequences": 64}
    data = {**_data(make_config), "seq_len": 2048}
    auto = load_config(make_config(model={"preset": "100m"}, batch=batch, data=data))
    full = auto.model_copy(update={"compute": _compute(auto, loss="full")})
    chunked, whole = (decided(config, A100) for config in (auto, full))
    assert chunked.loss.value == "chunked" and whole.loss.value == "full"
    assert int(chunked.micro_rows.value) > int(whole.micro_rows.value)
    small = decided(load_config(make_config()), CPU)
    assert small.loss.value == "full" and small.micro_rows.value == "8"
    capped = auto.model_copy(update={"compute": _compute(auto, loss="chunked")})
    with pytest.raises(UsageError, match=r"compute\.loss = 'chunked': .* no plain linear head"):
        decide(capped, A100, Model(nn.Linear(2, 2), None, make_model(auto).config), Choice("sdpa", ""), SINGLE, 1)


def test_micro_batch_leaves_room_for_what_a_device_holds(make_config: MakeConfig) -> None:
    """25,760 parameters at 16 bytes: whole, halved by two ranks, on the host. A row's activations take 163,840 bytes, and
    may fill half of the rest of 1.33 MB: 2.8, 3.4 and 4.06 rows."""
    card = Hardware("cuda", H100.name, 1_330_000, 16, (9, 0), 8)

    def rows(strategy: str, **compute: Any) -> str:
        config = load_config(make_config(compute={"loss": "chunked", **compute}, batch={"sequences": 120}))
        return decide(config, card, make_model(config), Choice("sdpa", ""), Choice(strategy, ""), 2).micro_rows.value

    assert [rows("fsdp", fsdp=fsdp) for fsdp in ({"shard": 1}, {}, {"offload": True})] == ["2", "3", "4"]


def test_fp8_by_measurement(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(make_config(compute={"fp8": {"smallest": 32}}))
    model, asked = make_model(config), []

    def timed(gain: float) -> Callable[..., list[Timing]]:
        def measure(shapes: dict[tuple[int, int], int], tokens: int, _: object) -> list[Timing]:
            asked.append((shapes, tokens))
            return [Timing(shape, count, bf16=gain, fp8=1.0) for shape, count in shapes.items()]

        return measure

    monkeypatch.setattr(scale.choices, "backend", lambda _: "torchao")
    monkeypatch.setattr(scale.choices, "measure", timed(1.4))
    fast = measured_precision(config, H100, model, SINGLE)
    assert fast.value == "fp8" and "1.40x" in fast.reason
    assert asked == [({(32, 32): 4, (48, 32): 4, (32, 48): 2}, 8192)]
    monkeypatch.setattr(scale.choices, "measure", timed(1.01))
    assert measured_precision(config, H100, model, SINGLE).value == "bf16"
    # nothing is timed where the answer is known
    asked.clear()
    assert measured_precision(config, A100, model, SINGLE).value == "bf16"
    assert measured_precision(config, H100, model, Choice("deepspeed", "")).value == "bf16"
    larger = config.model_copy(update={"compute": _compute(config, fp8={"smallest": 1024})})
    assert "no matrix has sides of 1024" in measured_precision(larger, H100, model, SINGLE).reason
    fixed = config.model_copy(update={"compute": _compute(config, precision="bf16")})
    assert measured_precision(fixed, H100, model, SINGLE) == Choice("bf16", "asked for")
    assert asked == []


def test_a_resumed_run_does_not_measure_again(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from scale.build import build_trainer

    path = make_config(compute={"fp8": {"smallest": 32}}, train={"steps": 2})
    config = load_config(path)
    build_trainer(config).fit()  # on a CPU: auto was fp32
    monkeypatch.setattr(scale.choices, "backend", lambda _: "torchao")
    monkeypatch.setattr(scale.choices, "measure", lambda *_: pytest.fail("measured"))
    assert measured_precision(config, H100, make_model(config), SINGLE) == Choice("fp32", "as this run was started")


def test_what_a_resumed_run_must_share(make_config: MakeConfig) -> None:
    config = load_config(make_config(compute={"attention": "eager"}))
    shared = settled(config, decided(config, CPU), world_size=2)
    assert shared == {
        "compute.precision": "fp32",
        "compute.compile": "off",
        "compute.kernels": "off",
        "compute.recompute": "off",
        "batch.micro with single on 2 ranks": "8",
        "compute.loss with single on 2 ranks": "full",
    }


def test_a_decision_on_compiling_knows_the_strategy(make_config: MakeConfig) -> None:
    config, deepspeed = load_config(make_config()), Choice("deepspeed", "asked for")
    model = make_model(config)
    assert decide(config, A100, model, Choice("sdpa", ""), deepspeed, 2).compile.value == "off"
    assert decide(config, A100, model, Choice("sdpa", ""), SINGLE, 2).compile.value == "default"


def test_strategy() -> None:
    assert [choose_strategy(ComputeConfig(), n).value for n in (1, 2)] == ["single", "fsdp"]
    with pytest.raises(UsageError, match="2 ranks were started"):
        choose_strategy(ComputeConfig(strategy="single"), 2)


@pytest.mark.parametrize(
    ("section", "options", "refused_on"),
    [
        ("fsdp", {"offload": True}, [1]),
        ("fsdp", {"shard": 4}, [1]),
        ("fsdp", {"shard": 1, "reshard": False, "reduce": "step"}, []),
        ("deepspeed", {"offload": True}, [1, 4]),
        ("deepspeed", {"config": "ds.json"}, [1, 4]),
        ("deepspeed", {"stage": 2}, []),
    ],
)
def test_options_that_the_automatic_strategy_would_not_heed(section: str, options: Any, refused_on: list[int]) -> None:
    compute = ComputeConfig.model_validate({section: options})
    for ranks in (1, 4):
        if ranks not in refused_on:
            choose_strategy(compute, ranks)
            continue
        chosen = "single (one process)" if ranks == 1 else "fsdp (4 ranks)"
        with pytest.raises(UsageError, match=rf"compute\.{section}\.{next(iter(options))} = .*{re.escape(chosen)}"):
            choose_strategy(compute, ranks)


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        ({"precision": "fp8"}, ["compute.precision = 'fp8'", "has none in hardware"]),
        ({"precision": "fp8", "fp8": {"emulate": True}}, ["compute.fp8.smallest = 1024"]),
        ({"kernels": "liger"}, ["compute.kernels = 'liger': its kernels need CUDA"]),
        ({"loss": "cce"}, ["compute.loss = 'cce': its kernel needs CUDA"]),
    ],
)
def test_refusals(make_config: MakeConfig, compute: dict[str, Any], said: list[str]) -> None:
    from scale.build import build_trainer

    with pytest.raises(UsageError) as refused:
        build_trainer(load_config(make_config(compute=compute)))
    assert all(text in str(refused.value) for text in said) and "\n" not in str(refused.value)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_run_in_emulated_fp8_follows_fp32(make_config: MakeConfig, recipe: str) -> None:
    """20 steps: losses within 1% of fp32's (their fall is 23%), and not equal; the loss in chunks is fp32's."""
    from scale.build import build_trainer
    from tests.conftest import metrics_of

    losses = {}
    fp8 = {"emulate": True, "smallest": 16, "recipe": recipe}
    for name, compute in {"fp32": {}, "fp8": {"precision": "fp8", "fp8": fp8}, "chunked": {"loss": "chunked"}}.items():
        trainer = build_trainer(load_config(make_config(name=name, compute=compute)))
        assert trainer.fit() == "completed"
        losses[name] = [row["loss"] for row in metrics_of(trainer.folder.path) if row["step"] > 0]
    assert losses["chunked"] == pytest.approx(losses["fp32"], rel=1e-5)
    assert losses["fp8"] == pytest.approx(losses["fp32"], rel=0.01) != pytest.approx(losses["fp32"], rel=1e-5)
    assert losses["fp32"][-1] < 0.85 * losses["fp32"][0]


def _compute(config: PretrainRun, **changes: Any) -> Any:
    return type(config.compute).model_validate({**config.compute.model_dump(), **changes})


def _data(make_config: MakeConfig) -> dict[str, Any]:
    return load_config(make_config()).data.model_dump(exclude_unset=True)
