import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from scale.errors import UsageError
from scale.models.leak import refuse_leaks
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from tests.models.test_build import tiny


@pytest.mark.parametrize("make", [
    lambda: tiny(),
    lambda: GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2)),
])  # fmt: skip
def test_models_that_honour_positions_pass_and_stay_as_they_were(make):
    model = make().train()
    before = [p.clone() for p in model.parameters()]
    root = Root(model, objective := CausalLM())
    refuse_leaks(root, 100)
    assert model.training and root.objective is objective
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("make", [
    lambda: OPTForCausalLM(OPTConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, ffn_dim=64,
                                     num_attention_heads=2, word_embed_proj_dim=32, init_std=0.4)),
    lambda: FalconForCausalLM(FalconConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                           alibi=True, initializer_range=0.4)),
])  # fmt: skip
def test_models_that_do_not_are_refused_by_name(make):
    with pytest.raises(UsageError, match=r"lets the documents of a row see each other.*cross_documents=true"):
        refuse_leaks(Root(make(), CausalLM()), 100)
