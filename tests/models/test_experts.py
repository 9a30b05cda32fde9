"""A mixture of experts: sizes, FLOPs and initial weights of GPT-OSS."""

import pytest
import torch
from torch import nn

from scale.config.model import ModelConfig
from scale.models.build import build_model, materialise
from scale.models.hf_config import model_config
from scale.models.size import activation_bytes_per_token, experts_of, flops_per_token, model_size

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2,
         "sliding_window": 8}  # fmt: skip


def small():
    config = ModelConfig(preset="gpt_oss_20b", overrides=SMALL)
    hf_config = model_config(config)
    return (hf_config, *build_model(config, hf_config, "eager", seed=3))


def test_the_preset_is_gpt_oss_20b():
    """20.9B parameters, 3.6B of them active (model card of gpt-oss-20b, arXiv 2508.10925, table 1)."""
    config = ModelConfig(preset="gpt_oss_20b")
    hf_config = model_config(config)
    model, _ = build_model(config, hf_config, "eager", seed=0)
    assert all(p.is_meta for p in model.parameters())
    size = model_size(model)
    assert size.total == 20_914_757_184
    assert size.matrix == pytest.approx(3.61e9, rel=0.005)
    assert hf_config.layer_types[:2] == ["sliding_attention", "full_attention"] and hf_config.sliding_window == 128


def test_flops_count_the_experts_that_a_token_visits():
    hf_config, model, _ = small()
    assert experts_of(hf_config) == (8, 2)
    attention = 64 * 64 * 2 + 64 * 32 * 2
    matrices = 3 * (attention + 64 * 8 + 2 * 3 * 64 * 48) + 96 * 64  # router, 2 of 8 experts, head
    assert model_size(model).matrix == matrices
    assert flops_per_token(model_size(model), hf_config, 32) == 6 * matrices + 12 * 3 * 4 * 16 * 32
    assert activation_bytes_per_token(hf_config, None, 2) == 3 * (14 * 64 + 4 * 2 * 48) * 2 + 3 * 96 * 4
    assert activation_bytes_per_token(hf_config, None, 2, logits=False) == 3 * (14 * 64 + 4 * 2 * 48) * 2


def test_initial_weights():
    _, model, weights = small()
    materialise(model, weights, torch.device("cpu"))
    spread = {n.removeprefix("model.layers.1."): p for n, p in model.named_parameters()}
    for name, p in spread.items():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
    writer = 0.02 / 6**0.5
    for name, std in {"mlp.experts.gate_up_proj": 0.02, "mlp.experts.down_proj": writer, "mlp.router.weight": 0.02,
                      "self_attn.o_proj.weight": writer, "self_attn.q_proj.weight": 0.02}.items():  # fmt: skip
        assert spread[name].std().item() == pytest.approx(std, rel=0.1), name
    assert 0 < spread["self_attn.sinks"].abs().max() < 0.1  # one each head: a normal draw, as transformers does
    logits = model(input_ids=torch.arange(12).view(2, 6), use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(1, 13))
    assert loss.item() == pytest.approx(torch.tensor(96.0).log().item(), rel=0.05)
