import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from scale.data.packing import Span
from scale.data.rows import IGNORE, RowReader
from scale.objectives.causal_lm import CausalLM
from tests.data.test_rows import InMemory

DOCS = [[5, 6, 7, 8, 9, 10, 2], [11, 12, 13, 2], [14, 15, 16, 17, 18, 2]]


def model(attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batch_of(docs, seq_len, cross=False):
    rows = [[Span(0, i, 0, len(d) - 1) for i, d in enumerate(docs)]]
    return RowReader([InMemory(docs)], cross).batch(rows, seq_len)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_of_a_packed_document_is_its_loss_alone(attention):
    net, objective = model(attention), CausalLM(per_document=True)
    with torch.no_grad():
        packed = objective(net, batch_of(DOCS, 20)).per_segment[0]
        alone = [objective(net, batch_of([d], len(d) - 1)).terms["lm"].total for d in DOCS]
    for together, single in zip(packed, alone, strict=False):
        assert float(together) == pytest.approx(float(single), rel=1e-5)
    assert float(packed[len(DOCS) :].sum()) == 0.0  # padding


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_does_not_leak_across_a_boundary_and_does_when_allowed(attention):
    net, objective = model(attention), CausalLM(per_document=True)
    changed = [[30, 29, 28, 27, 26, 25, 2], *DOCS[1:]]
    with torch.no_grad():
        before, after = (objective(net, batch_of(d, 20)).per_segment[0] for d in (DOCS, changed))
        assert torch.equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])
        logits = [net(**inputs(batch_of(d, 20, cross=True))).logits[0, 6:9] for d in (DOCS, changed)]
    assert not torch.allclose(*logits)


def inputs(batch):
    """With a cache, Hugging Face models do not look for packed documents."""
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}


def test_sum_and_count_against_float64():
    net = model()
    batch = batch_of(DOCS, 20)
    with torch.no_grad():
        loss = CausalLM()(net, batch)
        logits = net.double()(**inputs(batch)).logits[0]
    logp = logits.log_softmax(-1)
    expected = -sum(float(logp[t, y]) for t, y in enumerate(batch["targets"][0].tolist()) if y != IGNORE)
    assert float(loss.terms["lm"].total) == pytest.approx(expected, rel=1e-6)
    assert int(loss.terms["lm"].count) == sum(len(d) - 1 for d in DOCS)
    assert int(CausalLM().counts(batch)["lm"]) == int(loss.terms["lm"].count)


def test_equals_the_loss_that_hugging_face_computes_for_one_document():
    net = model()
    ids = torch.tensor([DOCS[0]])
    with torch.no_grad():
        theirs = net(input_ids=ids, labels=ids).loss
        term = CausalLM()(net, batch_of([DOCS[0]], len(DOCS[0]) - 1)).terms["lm"]
    assert float(term.total / term.count) == pytest.approx(float(theirs), rel=1e-6)


def test_gradient_comes_from_learned_positions_only():
    net = model()
    batch = batch_of(DOCS, 20)
    batch["targets"][:, 2:] = IGNORE
    CausalLM()(net, batch).terms["lm"].total.backward()
    logits = net(**inputs(batch)).logits
    expected = torch.autograd.grad(
        F.cross_entropy(logits[0, :2], batch["targets"][0, :2], reduction="sum"), net.lm_head.weight
    )
    assert torch.allclose(net.lm_head.weight.grad, expected[0], atol=1e-5)
