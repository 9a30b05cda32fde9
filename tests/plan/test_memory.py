"""What one GPU holds: by hand, and beside every allocation of a real step."""

from __future__ import annotations

import pytest

from scale.errors import ScaleError
from scale.parallel.ranks import Ranks
from scale.plan.fake import FUSED, fake_ranks, fake_tensors
from scale.plan.memory import HELD
from tests.distributed.harness import run_ranks
from tests.plan.real import TINY, model_of, planned_step, real_step

ADAMW = {"kind": "adamw"}


def by_hand() -> int:
    """Parameters of TINY: a tied embedding, three layers of four projections, a gated MLP and two norms, a last norm."""
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    return 1000 * 64 + 3 * (attention + 3 * 64 * 160 + 2 * 64) + 64


def test_held_by_one_gpu_exactly() -> None:
    memory = planned_step(1, TINY, 2, 32, 1, ADAMW)
    tensors = 1 + 3 * 9 + 1
    rotary = 2 * 8 * 4  # two fp32 buffers of head_dim / 2
    assert memory.held == {
        "weights": 4 * by_hand() + rotary,
        "gradients": 4 * by_hand(),
        "optimizer": 8 * by_hand() + 4 * tensors,  # two moments, and a step count for each tensor
    }


@pytest.mark.parametrize("ranks", [2, 3, 7, 48])
def test_share_of_rank_0_exactly(ranks: int) -> None:
    """FSDP2 cuts rows into equal chunks, the last ones shorter or empty: rank 0 has the largest share, padded or not."""
    module, _ = model_of(TINY)
    share = sum(-(-len(p) // ranks) * (p.numel() // len(p)) for p in module.parameters())
    memory = planned_step(ranks, TINY, 2, 32, 1, ADAMW, sharded=True)
    tensors = sum(1 for _ in module.parameters())
    assert memory.held == {
        "weights": 4 * share + 2 * 8 * 4,
        "gradients": 4 * share,
        "optimizer": 8 * share + 4 * tensors,
    }


@pytest.mark.parametrize(
    "case",
    [
        {"micros": 1, "optim": ADAMW},
        {"micros": 2, "optim": ADAMW, "precision": "bf16"},
        {"micros": 1, "optim": ADAMW, "recompute": 1},
        {"micros": 3, "optim": {"kind": "muon"}, "loss": "chunked"},
    ],
    ids=["fp32", "bf16-accumulated", "recompute", "muon-chunked"],
)
def test_peak_beside_a_real_step(case: dict) -> None:
    real = real_step(Ranks(), TINY, 4, 128, **case)
    assert planned_step(1, TINY, 4, 128, **case).peak == pytest.approx(real, rel=0.02)


@pytest.mark.slow
def test_peak_beside_two_real_ranks() -> None:
    case = {"sizes": TINY, "rows": 4, "seq_len": 128, "micros": 2, "optim": ADAMW, "precision": "bf16", "sharded": True}
    real = run_ranks("tests.plan.real:real_step", 2, **case)
    assert planned_step(2, **case).peak == pytest.approx(real[0], rel=0.1)


def test_offload_leaves_what_is_held_out_of_the_peak() -> None:
    from scale.config.optim import OptimConfig
    from scale.objectives.causal_lm import CausalLM
    from scale.objectives.root import Root
    from scale.plan.fake import fake_weights
    from scale.plan.memory import fake_batch, trace_step
    from tests.plan.real import strategy_of

    module, _ = model_of(TINY)
    with fake_ranks(4) as ranks:
        strategy = strategy_of(ranks, "bf16", True)
        assert strategy.mesh.size() == 4
        with fake_tensors():
            root = strategy.prepare(Root(module, CausalLM()), OptimConfig(), fake_weights)
            memory = trace_step(root, strategy, fake_batch(2, 32), 2, 1.0, offload=True)
    assert memory.host == sum(memory.held.values()) > 0
    assert all(memory.at_peak[name] == 0 for name in HELD)
    assert memory.peak > 0


def test_reduce_once_a_step_holds_whole_gradients() -> None:
    each = planned_step(8, TINY, 2, 32, 2, ADAMW, sharded=True)
    once = planned_step(8, TINY, 2, 32, 2, ADAMW, sharded=True, reduce="step")
    assert once.at_peak["gradient exchange"] >= 4 * by_hand() * 0.9 > each.at_peak["gradient exchange"]


def test_no_plan_inside_a_process_group() -> None:
    with fake_ranks(2), pytest.raises(ScaleError, match="joined a process group"), fake_ranks(2):
        pass


def test_fused_attention_holds_neither_scores_nor_mask() -> None:
    """Beside sdpa with a mask: queries, keys, values and output stay, the mask and repeated keys and values go."""
    import torch

    from scale.config.model import ModelConfig
    from scale.models.build import build_model
    from scale.models.hf_config import model_config

    config = ModelConfig(preset="tiny", overrides=TINY)
    fused, _ = build_model(config, model_config(config), FUSED, 0)
    ids = torch.zeros(1, 8, dtype=torch.long)
    real, _ = build_model(config, model_config(config), "sdpa", 0)
    for module in (fused, real):
        module.to_empty(device="cpu")
    real.load_state_dict({k: torch.randn_like(v) for k, v in real.state_dict().items()})
    fused.load_state_dict(real.state_dict())
    for module in (fused, real):
        for name, buffer in module.named_buffers():
            buffer.fill_(0.1)
            del name
    with torch.no_grad():
        assert torch.allclose(fused(ids).logits, real(ids).logits, atol=1e-4)  # causal attention, whatever else
