"""The loss in chunks, and rows laid behind each other: both must change nothing but memory."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from scale.config.model import LoraConfig
from scale.data.packing import Span
from scale.data.rows import RowReader
from scale.models.adapters import add_adapter
from scale.models.attention import supported_attention
from scale.models.heads import decoder_and_head, obstacle
from scale.objectives import vocabulary
from scale.objectives.causal_lm import CausalLM
from tests.data.test_rows import InMemory

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
GPT_OSS = {**SIZES, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
DOCS = [[5, 6, 7, 8, 9, 10, 2], [11, 12, 13, 2], [14, 15, 16, 17, 18, 2], [20, 21, 22, 23, 24, 25, 26, 27, 28, 2]]


def make(config, attention="eager"):
    torch.manual_seed(0)
    config.initializer_range = 0.4
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def batch(cross=False, docs=DOCS):
    rows = [[Span(0, i, 0, len(docs[i]) - 1) for i in row] for row in ([0, 1], [2], [3, 1])]
    return RowReader([InMemory(docs)], cross).batch(rows, 14)


def outcome(model, objective, **options):
    """Loss, sums by document and every gradient."""
    model.zero_grad()
    loss = objective(model, batch(**options))
    loss.terms["lm"].total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.terms["lm"].total.detach(), "segments": loss.per_segment.detach(), **grads}


def assert_same(a, b):
    assert a.keys() == b.keys() and all(g is not None for g in a.values())
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-4, atol=1e-5 * max(1.0, a[name].abs().max().item()), msg=name
        )


@pytest.mark.parametrize("config", [
    LlamaConfig(**SIZES, tie_word_embeddings=True),
    LlamaConfig(**SIZES, tie_word_embeddings=False),
    Qwen3Config(**SIZES, head_dim=8),
    GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    GptOssConfig(**GPT_OSS),
])  # fmt: skip
def test_chunks_change_neither_loss_nor_gradients(config, monkeypatch):
    model = make(config)
    assert obstacle(model) is None
    full = outcome(model, CausalLM(per_document=True))
    monkeypatch.setattr(vocabulary, "CHUNK", 40 * 5)  # 42 positions: 8 chunks of 5 and one of 2
    assert_same(full, outcome(model, CausalLM(per_document=True, loss="chunked")))


def test_never_more_logits_than_a_chunk(monkeypatch):
    model, seen = make(LlamaConfig(**SIZES)), []
    model.lm_head.register_forward_hook(lambda _, inputs, out: seen.append(out.shape[0]))
    monkeypatch.setattr(vocabulary, "CHUNK", 40 * 16)
    outcome(model, CausalLM(per_document=True, loss="chunked"))
    assert seen[:3] == [16, 16, 10] and sorted(seen[3:]) == [10, 16, 16]  # once more in the backward pass


def test_chunks_with_an_adapter():
    model = add_adapter(make(LlamaConfig(**SIZES)), LoraConfig(kind="lora", rank=2), seed=0)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.1)
    assert obstacle(model) is None
    full = outcome(model, CausalLM(per_document=True))
    assert any("lora_A" in name for name in full)
    assert_same(full, outcome(model, CausalLM(per_document=True, loss="chunked")))


@pytest.mark.parametrize("config", [
    Gemma2Config(**SIZES, head_dim=8),
    CohereConfig(**SIZES),
    GraniteConfig(**SIZES),
    FalconH1Config(**SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4),
])  # fmt: skip
def test_models_that_scale_or_cap_their_logits_are_told_apart(config):
    with torch.device("meta"):
        assert "does more to its logits" in obstacle(make(config))


def test_a_head_with_an_adapter_is_no_plain_head():
    targets = LoraConfig(kind="lora", rank=2, targets=["lm_head"])
    assert "no plain linear head" in obstacle(add_adapter(make(LlamaConfig(**SIZES)), targets, seed=0))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_one_row_changes_nothing(attention, cross, loss):
    model = make(MistralConfig(**SIZES, sliding_window=None), attention)
    rows = outcome(model, CausalLM(per_document=True), cross=cross)
    assert_same(rows, outcome(model, CausalLM(per_document=True, loss=loss, one_row=True), cross=cross))


def test_one_row_is_what_the_model_sees():
    model, shapes = make(LlamaConfig(**SIZES)), []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(inputs[0].shape)))
    objective = CausalLM(one_row=True)
    assert objective.logits(model, batch()).shape == (3, 14, 40) and shapes == [(1, 42)]


def test_documents_of_gpt_oss_do_not_see_each_other():
    """Its forward builds masks without positions; also inside the window of its sliding layers."""
    model = make(GptOssConfig(**GPT_OSS)).eval()
    assert supported_attention(model.config) == ("eager", "flex_attention")
    changed = [[30, 29, 28, 27, 26, 25, 2], *DOCS[1:]]
    for one_row in (False, True):
        objective = CausalLM(per_document=True, one_row=one_row)
        with torch.no_grad():
            before, after = (objective(model, batch(docs=docs)).per_segment for docs in (DOCS, changed))
            crossing = [objective(model, batch(True, docs)).terms["lm"].total for docs in (DOCS, changed)]
            alone = objective(model, RowReader([InMemory(DOCS)]).batch([[Span(0, 1, 0, 3)]], 3)).terms["lm"].total
        assert not torch.equal(before[0, 0], after[0, 0]) and not torch.equal(*crossing)
        before[0, 0] = after[0, 0] = 0
        torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(before[0, 1], alone)


def test_what_is_called_is_what_is_compiled():
    model = make(LlamaConfig(**SIZES))
    assert CausalLM().called(model) is model
    assert CausalLM(loss="chunked").called(model) is model.model is decoder_and_head(model)[0]
