"""Models from folders: every stored weight is taken, every row learns, and what is not of text alone is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM

from scale.config.model import ModelConfig
from scale.errors import UsageError
from scale.models.attention import supported_attention
from scale.models.build import build_model, materialise
from scale.models.fields import check_fields, misfit
from scale.models.hf_config import model_config
from tests.models.families import tiny_model

INPUT = {"input_ids": torch.arange(40).view(2, 20), "position_ids": torch.arange(20).repeat(2, 1), "use_cache": False}


def load(folder: Path, lazy: bool = False, init: str = "auto", said: list[str] | None = None) -> torch.nn.Module:
    config = ModelConfig(path=str(folder), init=init)
    say = print if said is None else said.append
    hf_config = model_config(config)
    attention = supported_attention(hf_config)[0]
    model, weights = build_model(config, hf_config, attention, 0, lazy=lazy, say=say)
    if weights is not None:
        materialise(model, weights, torch.device("cpu"))
    return model


def saved(folder: Path, name: str = "llama", **more: Any) -> Path:
    tiny_model(name, **more).save_pretrained(folder)
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize("lazy", [False, True])
def test_stored_weights_that_no_parameter_takes_are_refused(tmp_path: Path, lazy: bool) -> None:
    edited(saved(tmp_path / "m"), num_hidden_layers=1)
    with pytest.raises(
        UsageError, match=r"9 stored weights belong to no parameter of the LlamaForCausalLM.* model.layers.1"
    ):
        load(tmp_path / "m", lazy)


def test_a_head_beside_a_tied_one_is_not_dropped_in_silence(tmp_path: Path) -> None:
    """Tied says the config, two tensors say the files: whichever is taken, logits are those that the folder had."""
    folder = saved(tmp_path / "m", tie_word_embeddings=False)
    before = load(folder)(**INPUT).logits
    edited(folder, tie_word_embeddings=True)
    try:
        after = load(folder)(**INPUT).logits
    except UsageError as error:
        assert "lm_head.weight" in str(error)
    else:
        assert torch.equal(before, after)


def test_buffers_that_old_versions_stored_do_no_harm(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load(folder).lm_head.weight, tensors["lm_head.weight"])


def test_parts_that_transformers_leaves_out_are_named(tmp_path: Path) -> None:
    """Layers of multi-token prediction."""
    folder = saved(tmp_path / "m", "deepseek_v3")
    pattern = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING["deepseek_v3"]]._keys_to_ignore_on_load_unexpected[0]
    tensors = load_file(folder / "model.safetensors")
    extra = "model.layers.61.eh_proj.weight"
    assert pattern in (r"model\.layers\.61.*",)
    save_file(tensors | {extra: torch.ones(4)}, folder / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    load(folder, said=said)
    assert len(said) == 1 and "1 stored tensors are not part of" in said[0] and extra in said[0]


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DAMAGE = {
    "shard of another model": (lambda m: shutil.copy(m / FIRST, m / "model-00009-of-00009.safetensors"),
                               "model-00009-of-00009.safetensors: is not listed"),
    "whole file beside shards": (lambda m: shutil.copy(m / FIRST, m / "model.safetensors"),
                                 "holds model.safetensors and model.safetensors.index.json"),
    "missing shard": (lambda m: (m / SECOND).unlink(), f"{SECOND}: no such file"),
    "cut shard": (lambda m: (m / SECOND).write_bytes(b"\x10"), f"{SECOND}: cut off or no safetensors file"),
    "cut index": (lambda m: (m / "model.safetensors.index.json").write_text("{"), "index.json: no index of safetensors files"),
    "no config": (lambda m: (m / "config.json").unlink(), "holds no config.json"),
    "list for a config": (lambda m: (m / "config.json").write_text("[1]"), "expected a JSON object of fields, found list"),
    "misspelt type": (lambda m: edited(m, model_type="lama"), "model_type = 'lama': not known to transformers .* 'llama'"),
    "no type": (lambda m: (m / "config.json").write_text("{}"), "has no model_type"),
    "encoder and decoder": (lambda m: edited(m, model_type="t5"), "'t5': transformers has no causal language model"),
    "no vocabulary": (lambda m: edited(m, vocab_size=0), "vocab_size = 0: should be 1 or more"),
    "activation": (lambda m: edited(m, hidden_act="foo"), "config.json: hidden_act = 'foo': transformers has no"),
    "quantised": (lambda m: edited(m, quantization_config={"quant_method": "fp8"}), "quant_method = 'fp8': quantised weights"),
}  # fmt: skip


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_named_in_one_line(tmp_path: Path, what: str, lazy: bool) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "m", max_shard_size="60KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 2
    damage, words = DAMAGE[what]
    damage(tmp_path / "m")
    with pytest.raises(UsageError, match=words) as refused:
        load(tmp_path / "m", lazy)
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)


COMPOSITES = ["gemma3", "gemma3n", "gemma4", "llama4", "qwen3_5", "qwen3_5_moe", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
              "llava", "paligemma", "mllama", "idefics3", "smolvlm", "aya_vision", "emu3", "fuyu", "git", "phi4_multimodal",
              "internvl", "qwen2_audio", "voxtral", "qwen2_5_omni", "kimi_k25", "mistral3"]  # fmt: skip


@pytest.mark.parametrize("init", ["auto", "random"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_models_of_several_parts_are_refused(tmp_path: Path, name: str, init: str) -> None:
    CONFIG_MAPPING[name]().save_pretrained(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=rf"model_type = '{name}' is a model of several parts .*_config"):
        model_config(ModelConfig(path=str(tmp_path), init=init))


ROPES = {
    "default": {}, "linear": {"factor": 4.0}, "dynamic": {"factor": 4.0}, "yarn": {"factor": 4.0},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 16, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    "llama3": {"factor": 4.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}  # fmt: skip
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_positions_of_every_kind(tmp_path: Path, kind: str) -> None:
    """A preset, made on the meta device, and a folder, also read one by one, say what transformers' own model says."""
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **ROPES[kind]}
    config = ModelConfig(preset="tiny", overrides=SHAPE | {"rope_parameters": rope})
    hf_config = model_config(config)
    ours, weights = build_model(config, hf_config, "sdpa", 0)
    materialise(ours, weights, torch.device("cpu"))
    theirs = LlamaForCausalLM(hf_config)
    theirs.load_state_dict(ours.state_dict())
    theirs.save_pretrained(tmp_path / "m")
    with torch.no_grad():
        want = theirs.eval()(**INPUT).logits
        for model in (ours, load(tmp_path / "m"), load(tmp_path / "m", lazy=True)):
            assert torch.equal(model.eval()(**INPUT).logits, want)
    plain = model_config(ModelConfig(preset="tiny", overrides=SHAPE))
    assert (LlamaForCausalLM(plain).model.rotary_emb.inv_freq.equal(ours.model.rotary_emb.inv_freq)) == (
        kind in ("default", "dynamic")  # of dynamic only beyond the length that it was trained for
    )


@pytest.mark.parametrize("init", ["auto", "random", "lazy"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mixtral", "opt", "bart", "cohere", "phi3"])
def test_the_row_of_the_padding_token_learns(tmp_path: Path, name: str, init: str) -> None:
    folder = saved(tmp_path / "m", name)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 0
    model = load(folder, lazy=init == "lazy", init="random" if init == "random" else "auto")
    embedding = model.get_input_embeddings()
    if init == "random":
        assert 0.3 < embedding.weight[0].std() / embedding.weight[1:].std() < 3
    model(input_ids=torch.arange(6)[None], use_cache=False).logits.logsumexp(-1).sum().backward()
    untied = embedding.weight.grad.norm(dim=1)
    assert (untied[:6] > 0).all()


def test_the_padding_row_of_a_preset_learns() -> None:
    config = ModelConfig(preset="tiny", overrides=SHAPE | {"pad_token_id": 0, "tie_word_embeddings": False})
    model, weights = build_model(config, model_config(config), "sdpa", 0)
    materialise(model, weights, torch.device("cpu"))
    model(**INPUT).logits.logsumexp(-1).sum().backward()
    assert model.model.embed_tokens.weight.grad[0].norm() > 0


def test_configs_of_other_families_pass() -> None:
    """No default of transformers is taken for a mistake."""
    for name in (
        "gpt2",
        "bloom",
        "mpt",
        "xlnet",
        "falcon",
        "mamba",
        "rwkv",
        "granitemoe",
        "deepseek_v3",
        "gemma3_text",
        "t5",
    ):
        check_fields(CONFIG_MAPPING[name]().to_dict(), lambda key: key)
        assert misfit(CONFIG_MAPPING[name]().to_dict(), lambda key: key) is None


def test_models_that_count_positions_otherwise_are_refused(tmp_path: Path) -> None:
    """RoBERTa's kind: asked without positions, the model takes others than a packed document has."""
    model = tiny_model("camembert")
    own = {key: value for key, value in INPUT.items() if key != "position_ids"}
    assert not torch.allclose(model(**own).logits, model(**INPUT).logits, atol=1e-3)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(UsageError, match="'camembert': its positions begin after pad_token_id"):
        load(tmp_path / "m")
