"""Packed documents on a GPU: each is scored as if it were alone."""

import pytest
import torch

from scale.data.rows import IGNORE
from scale.hardware import installed
from scale.models.leak import refuse_leaks
from scale.objectives.causal_lm import CausalLM
from scale.parallel.single import Single
from tests.gpu import DEVICE, GPU
from tests.gpu.parts import LENGTH, VOCAB, make_stepper, single

pytestmark = GPU
KINDS = ["sdpa", "flex_attention", "flash_attention_2"]


@pytest.fixture(params=KINDS)
def attention(request):
    if request.param == "flash_attention_2" and (DEVICE == "cpu" or not installed("flash_attn")):
        pytest.skip("flash-attn is not installed")
    return request.param


def row(*documents):
    """One row of documents."""
    ids = torch.cat(documents)
    segments = torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)])
    positions = torch.cat([torch.arange(len(d)) for d in documents])
    targets = torch.cat([torch.cat([d[1:], torch.tensor([IGNORE])]) for d in documents])
    made = {"input_ids": ids, "targets": targets, "position_ids": positions, "segment_ids": segments}
    return {name: tensor[None].to(DEVICE) for name, tensor in made.items()}


def test_a_document_is_scored_as_if_alone(attention):
    precision = "bf16" if attention == "flash_attention_2" else "fp32"
    root = make_stepper(Single(DEVICE, precision), attention=attention, initializer_range=0.2).root
    refuse_leaks(root, VOCAB)
    rng = torch.Generator().manual_seed(0)
    ours, first, other, long = (torch.randint(VOCAB, (n,), generator=rng) for n in (100, 156, 156, LENGTH))
    objective = CausalLM(per_document=True, one_row=attention == "flash_attention_2")
    root.objective = objective
    with torch.no_grad():
        alone = root(row(ours, first)).per_segment[0, 0]
        second, again = (root(row(before, ours)).per_segment[0, 1] for before in (first, other))
        crossing = row(first, ours)
        crossing["position_ids"] = torch.arange(LENGTH, device=DEVICE)[None]
        seen = root(crossing).per_segment[0, 1]
        assert root(row(long)).per_segment.isfinite().all()
    near = 3e-5 if precision == "fp32" else 1e-3
    assert float(second) == pytest.approx(float(alone), rel=near) and float(again) == pytest.approx(
        float(alone), rel=near
    )
    assert float(seen) != pytest.approx(float(alone), rel=5 * near)


def test_losses_are_those_of_a_cpu(attention):
    if DEVICE == "cpu" and attention == "flex_attention":
        pytest.skip("torch has no backward pass for it on a CPU")
    precision = "bf16" if attention == "flash_attention_2" else "fp32"
    tolerance = 1e-2 if precision == "bf16" else 5e-4
    assert single(DEVICE, precision, attention=attention) == pytest.approx(single("cpu"), rel=tolerance)
