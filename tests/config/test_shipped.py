"""The configs and presets that come with the framework keep what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scale.config import load_config
from scale.config.model import ModelConfig
from scale.models.build import build_model
from scale.models.hf_config import model_config
from scale.models.presets import PRESETS

ROOT = Path(__file__).parents[2]
ALL = sorted((ROOT / "configs").rglob("*.yaml"))
BASES = [path for path in ALL if path.name == "base.yaml"]  # shared parts, no runs by themselves
RUNS = [path for path in ALL if path.name != "base.yaml"]
GROWING = ["100m", "500m", "1b"]


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", RUNS, ids=shown)
def test_every_shipped_config_loads(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("path", BASES, ids=shown)
def test_every_base_is_extended(path: Path) -> None:
    parents = [run.parent / yaml.safe_load(run.read_text()).get("extends", "") for run in RUNS]
    assert path in parents


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "pretrain").glob("[!b]*.yaml")), ids=shown)
def test_recipes(path: Path) -> None:
    run = load_config(path)
    assert run.name == run.model.preset == path.stem
    assert [(lesson.until, lesson.seq_len) for lesson in run.data.curriculum] == [(0.4, 512), (0.7, 1024)]
    assert run.data.seq_len == 2048 and run.batch.tokens is not None
    assert (run.optim.betas, run.optim.weight_decay, run.optim.clip) == ((0.9, 0.95), 0.1, 1.0)
    if path.stem == "7b":
        assert (run.train.steps, run.schedule.warmup) == (100_000, 5000)
        assert (run.optim.lr, run.optim.lr * run.schedule.final) == (3e-4, pytest.approx(3e-5))


def test_larger_models_learn_more_slowly() -> None:
    rates = [load_config(ROOT / "configs" / "pretrain" / f"{name}.yaml").optim.lr for name in [*GROWING, "7b"]]
    assert rates == sorted(set(rates), reverse=True)


@pytest.mark.parametrize(("name", "parameters"), [("100m", 1e8), ("500m", 5e8), ("1b", 1e9), ("7b", 7e9)])
def test_a_preset_is_as_large_as_its_name(name: str, parameters: float) -> None:
    config = ModelConfig(preset=name)  # type: ignore[arg-type]
    model, _ = build_model(config, model_config(config), "sdpa", seed=0)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.05)


def test_presets_can_be_expanded_into_the_next() -> None:
    same = ["head_dim", "vocab_size", "tie_word_embeddings", "rope_parameters", "max_position_embeddings"]
    shapes = [model_config(ModelConfig(preset=name)) for name in GROWING]  # type: ignore[arg-type]
    for key in same:
        assert all(getattr(s, key) == getattr(shapes[0], key) for s in shapes), key
    assert len({s.num_attention_heads / s.num_key_value_heads for s in shapes}) == 1
    sizes = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    for key in sizes:
        values = [getattr(s, key) for s in shapes]
        assert values == sorted(set(values)), key
    assert {key for name in GROWING for key in PRESETS[name]} == {*same, *sizes}  # no dimension is left out above
