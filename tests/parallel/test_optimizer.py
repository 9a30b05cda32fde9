import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from scale.config.optim import OptimConfig
from scale.errors import MissingExtra, ScaleError
from scale.parallel.optimizer import OptimizerSet

KINDS = ["adamw", "muon", "adamw8bit"]


def llama(tie=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=80, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=tie,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def take_steps(model, optimizer, n, seed=0):
    torch.manual_seed(seed)
    for _ in range(n):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step(0.5)
        optimizer.zero_grad()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_moments_read_and_restored_continue_like_the_original(kind):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model = llama()
    optimizer = OptimizerSet(model, OptimConfig(kind=kind, lr=1e-2))
    take_steps(model, optimizer, 3)
    moments = {k: v.clone() for k, v in optimizer.moments().items()}
    twin = llama()
    twin.load_state_dict(model.state_dict())
    second = OptimizerSet(twin, OptimConfig(kind=kind, lr=1e-2))
    blank = second.blank({k: v.shape for k, v in moments.items()})
    for k, v in blank.items():
        v.copy_(moments[k])
    second.restore(blank)
    take_steps(model, optimizer, 3, seed=1)
    take_steps(twin, second, 3, seed=1)
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("kind", KINDS)
def test_canonical_moments_are_fp32_of_the_shape_of_their_parameter(kind):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model = llama()
    optimizer = OptimizerSet(model, OptimConfig(kind=kind))
    take_steps(model, optimizer, 1)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    for key, value in optimizer.moments().items():
        name, _, moment = key.rpartition("/")
        assert value.dtype == torch.float32
        if not moment.endswith("_scale"):
            assert value.shape == (() if moment == "step" else shapes[name])
    assert {k.rpartition("/")[0] for k in optimizer.moments()} == set(shapes)


def test_eight_bit_moments_are_close_to_the_full_ones():
    pytest.importorskip("bitsandbytes")
    a, b = llama(), llama()
    full, small = (OptimizerSet(m, OptimConfig(kind=k, lr=1e-3)) for m, k in ((a, "adamw"), (b, "adamw8bit")))
    take_steps(a, full, 5), take_steps(b, small, 5)
    key = "model.layers.0.mlp.gate_proj.weight/exp_avg"
    x, y = full.moments()[key], small.moments()[key]
    assert 0 < (x - y).norm() / x.norm() < 0.05


def test_eight_bit_takes_over_full_moments():
    pytest.importorskip("bitsandbytes")
    a, b = llama(), llama()
    full = OptimizerSet(a, OptimConfig(kind="adamw", lr=1e-3))
    take_steps(a, full, 5)
    small = OptimizerSet(b, OptimConfig(kind="adamw8bit", lr=1e-3))
    small.restore(full.moments())
    key = "model.layers.0.mlp.gate_proj.weight/exp_avg"
    x, y = full.moments()[key], small.moments()[key]
    assert 0 < (x - y).norm() / x.norm() < 0.02


def groups_by_name(optimizer):
    return {
        optimizer.names[p]: (type(o).__name__, g["weight_decay"])
        for o in optimizer.optimizers
        for g in o.param_groups
        for p in g["params"]
    }


def test_decay_is_for_matrices_and_muon_for_those_inside_blocks():
    adam = groups_by_name(OptimizerSet(llama(), OptimConfig(weight_decay=0.1)))
    assert adam["model.layers.0.mlp.up_proj.weight"] == ("AdamW", 0.1) and adam["lm_head.weight"] == ("AdamW", 0.1)
    assert adam["model.norm.weight"] == ("AdamW", 0.0) and adam["model.embed_tokens.weight"] == ("AdamW", 0.0)
    muon = groups_by_name(OptimizerSet(llama(), OptimConfig(kind="muon", weight_decay=0.1)))
    assert {name for name, (kind, _) in muon.items() if kind == "Muon"} == {
        f"model.layers.0.{m}.weight"
        for m in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                  "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }  # fmt: skip
    assert muon["lm_head.weight"] == ("AdamW", 0.1)


def test_tied_weights_are_held_once():
    optimizer = OptimizerSet(llama(tie=True), OptimConfig())
    held = [p for group in optimizer.groups() for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(llama(tie=True).parameters()))


def test_muon_step_is_orthogonal_with_the_size_of_an_adam_step():
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    before = model[0].weight.detach().clone()
    optimizer = OptimizerSet(model, OptimConfig(kind="muon", lr=1e-2, weight_decay=0.0))
    model[0].weight.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    optimizer.step(1.0)
    update = (before - model[0].weight.detach()) / (1e-2 * 0.2 * 64**0.5)
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.6 and singular.max() < 1.3  # five Newton-Schulz steps land near 1


def test_peak_lr_times_factor():
    model = nn.Linear(2, 2)
    optimizer = OptimizerSet(model, OptimConfig(lr=0.1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(0.25)
    optimizer.step(0.5)
    assert {group["lr"] for group in optimizer.groups()} == {0.05}


def test_frozen_parameters_have_no_moments_and_nothing_to_train_is_an_error():
    model = llama()
    model.requires_grad_(False)
    with pytest.raises(ScaleError, match="nothing to train"):
        OptimizerSet(model, OptimConfig())
    model.lm_head.weight.requires_grad_(True)
    optimizer = OptimizerSet(model, OptimConfig())
    assert list(optimizer.names.values()) == ["lm_head.weight"]
    with pytest.raises(ScaleError, match="which this run does not train"):
        optimizer.blank({"model.norm.weight/exp_avg": torch.Size([64])})


def test_missing_bitsandbytes_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"scale-trainer\[quant\]"):
        OptimizerSet(llama(), OptimConfig(kind="adamw8bit"))


def test_moments_of_another_optimizer_are_refused_in_one_line():
    """As of a run that Muon trained with when more was taken for a matrix."""
    optimizer = OptimizerSet(llama(), OptimConfig(kind="muon"))
    with pytest.raises(
        ScaleError, match=r"momentum_buffer of 'model.norm.weight', which AdamW trains here: go on with"
    ):
        optimizer.blank({"model.norm.weight/momentum_buffer": torch.Size([64])})
    with pytest.raises(ScaleError, match=r"exp_avg of 'model.layers.0.mlp.up_proj.weight', which Muon trains here"):
        optimizer.blank({"model.layers.0.mlp.up_proj.weight/exp_avg": torch.Size([80, 64])})
