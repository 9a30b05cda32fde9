from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from scale.predict.kinds import KINDS, kind_of

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
LLAMA = SMALL | {"intermediate_size": 12}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA, tie_word_embeddings=True), 12 - 1, "embed q k v o gate up down norm"),
    "qwen3": (
        Qwen3ForCausalLM, Qwen3Config(**LLAMA, num_key_value_heads=1, head_dim=4, tie_word_embeddings=False), 14,
        "embed q k v o gate up down norm head",
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11), 16, "embed q o up down norm"),
    "neox": (
        GPTNeoXForCausalLM, GPTNeoXConfig(**LLAMA, tie_word_embeddings=False), 16, "embed q o up down norm head",
    ),
    "opt": (
        OPTForCausalLM, OPTConfig(**SMALL, ffn_dim=12, word_embed_proj_dim=8), 20, "embed q k v o up down norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
def test_every_parameter_of_known_families_has_its_kind(family):
    made, config, count, expected = MODELS[family]
    with torch.device("meta"):
        names = [name for name, _ in made(config).named_parameters()]
    assert {KINDS[kind_of(name)] for name in names} == set(expected.split()) and len(names) == count


@pytest.mark.parametrize(
    ("name", "kind"),
    {
        "model.layers.3.self_attn.q_proj.weight": "q",
        "model.layers.3.self_attn.k_proj.bias": "k",
        "model.layers.3.self_attn.q_norm.weight": "norm",
        "model.layers.3.post_attention_layernorm.weight": "norm",
        "model.layers.3.mlp.experts.gate_up_proj": "up",
        "model.layers.3.block_sparse_moe.gate.weight": "rest",
        "model.layers.3.block_sparse_moe.experts.7.w1.weight": "gate",
        "transformer.h.0.attn.c_attn.weight": "q",
        "transformer.h.0.attn.c_proj.weight": "o",
        "transformer.h.0.mlp.c_proj.weight": "down",
        "transformer.h.0.ln_1.bias": "norm",
        "transformer.wpe.weight": "embed",
        "gpt_neox.layers.0.attention.dense.weight": "o",
        "gpt_neox.layers.0.mlp.dense_4h_to_h.bias": "down",
        "model.decoder.layers.0.self_attn.out_proj.bias": "o",
        "model.decoder.layers.0.fc1.weight": "up",
        "model.decoder.project_in.weight": "rest",
        "lm_head.weight": "head",
        "weight": "rest",
        "value_head.0.weight": "rest",
    }.items(),
)
def test_names(name, kind):
    assert KINDS[kind_of(name)] == kind


def test_adapters_go_with_their_projection():
    with torch.device("meta"):
        config = LoraConfig(r=2, target_modules=["v_proj", "embed_tokens"], modules_to_save=["lm_head"])
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)), config)
    found = {name: KINDS[kind_of(name)] for name, param in model.named_parameters() if param.requires_grad}
    assert sorted(found.values()) == ["embed", "embed", "head", "v", "v"]
    assert all(KINDS[kind_of(n)] == "v" for n, _ in model.named_parameters() if "v_proj" in n)
