"""Plans of runs that train a part of their weights, or that hold more than a plain run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

from scale.config import load_config
from scale.config.model import LoraConfig, ModelConfig
from scale.models.adapters import add_adapter
from scale.models.build import build_model
from scale.models.hf_config import model_config
from scale.parallel.ranks import Ranks
from scale.plan.plan import Plan, make_plan
from scale.plan.settle import planned
from scale.predict.weights.memory import footprint
from tests.conftest import tiny_run
from tests.plan import real
from tests.plan.real import TINY, planned_step, real_step

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 256}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "experts": {"model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                "moe_intermediate_size": 32},
}  # fmt: skip
LORA = {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    """A plan of a model folder of a family, which has a config and a file of weights that no plan reads."""

    def make(family: str, gpus: int, **changes: Any) -> Plan:
        folder = tmp_path / family
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(SIZES | FAMILIES[family]))
        save_file({}, folder / "model.safetensors")
        content = tiny_run(tmp_path, model={"path": str(folder)}, batch={"sequences": 8, "micro": 1}, **changes)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return make_plan(load_config(path), gpus, planned("h100"))

    return make


@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter(plan_of: Callable[..., Plan], family: str, gpus: int) -> None:
    """Rank 4 on q_proj (64 x 64) and v_proj (32 x 64) of three layers; nothing else has a gradient or moments."""
    made = plan_of(family, gpus, adapter=LORA)
    trained = 3 * (4 * (64 + 64) + 4 * (64 + 32))
    assert made.size.trainable == trained
    # rank 0 has its share of the rows of each matrix: two of 4 x 64, one of 64 x 4, one of 32 x 4 a layer
    share = 3 * (-(-4 // gpus) * 64 * 2 + -(-64 // gpus) * 4 + -(-32 // gpus) * 4)
    held, matrices = made.memory.held, 3 * 4
    assert held["gradients"] == 4 * share and held["optimizer"] == 8 * share + 4 * matrices
    assert made.memory.at_peak["optimizer"] == held["optimizer"] and held["weights"] >= 4 * made.size.total // gpus


@pytest.mark.parametrize("gpus", [1, 2])
def test_experts_in_fp32_and_bf16(plan_of: Callable[..., Plan], gpus: int) -> None:
    """On one GPU autocast leaves the stacked weights of experts in fp32, which their product takes as they are."""
    low, high = (plan_of("experts", gpus, compute={"precision": p}) for p in ("bf16", "fp32"))
    assert low.memory.held == high.memory.held and low.fits and high.fits


@pytest.mark.parametrize(("optim", "gpus"), [("adamw8bit", 1), ("muon", 1), ("muon", 2)])
def test_an_adapter_with_other_optimizers(plan_of: Callable[..., Plan], optim: str, gpus: int) -> None:
    made = plan_of("untied", gpus, adapter=LORA, optim={"kind": optim, "lr": 1e-3})
    assert 0 < made.memory.held["optimizer"] < 8 * made.size.trainable / gpus + 8192  # tables of the 8-bit kinds


@pytest.mark.parametrize("compute", [
    {"recompute": 1}, {"recompute": 2, "loss": "full"}, {"precision": "fp8"}, {"precision": "fp32"}, {"loss": "cce"},
    {"strategy": "fsdp", "fsdp": {"reduce": "step"}}, {"strategy": "deepspeed"},
], ids=str)  # fmt: skip
def test_an_adapter_under_other_options(plan_of: Callable[..., Plan], compute: dict[str, Any]) -> None:
    assert plan_of("tied", 1, adapter=LORA, compute=compute).fits


def test_peak_of_an_adapter_beside_a_real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def adapted(sizes: dict[str, int], recompute: int = 0) -> Any:
        config = ModelConfig(preset="tiny", overrides=sizes)
        module, weights = build_model(config, model_config(config), "sdpa", seed=0)
        return add_adapter(module, LoraConfig(kind="lora", rank=4), seed=0), weights

    monkeypatch.setattr(real, "model_of", adapted)
    case = {"micros": 2, "optim": {"kind": "adamw"}, "precision": "bf16"}
    measured = real_step(Ranks(), TINY, 4, 128, **case)
    assert planned_step(1, TINY, 4, 128, **case).peak == pytest.approx(measured, rel=0.02)


def test_what_prediction_keeps_is_in_the_plan(plan_of: Callable[..., Plan]) -> None:
    plain, predicted = (
        plan_of("tied", 1, **predict)
        for predict in (
            {},
            {"predict": {"enabled": True}},
        )
    )
    config = predicted.settled.config.predict
    kept = sum(footprint(predicted.size.trainable, config.directions).values())
    assert predicted.memory.peak - plain.memory.peak == kept == predicted.memory.held["prediction"] > 0
    assert "prediction" not in plain.memory.held
