"""What a parameter is for, told by its module: weight decay and Muon follow it, whatever the number of dimensions."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import nn

from scale.config.model import LoraConfig
from scale.config.optim import OptimConfig
from scale.models.adapters import add_adapter
from scale.models.roles import MATRICES, roles_of
from scale.parallel.optimizer import OptimizerSet
from tests.models.families import families, tiny_model
from tests.models.test_build import tiny


def named_roles(model: nn.Module) -> dict[str, str]:
    roles = roles_of(model)
    return {name: roles[param] for name, param in model.named_parameters()}


EXPECTED = {
    "gpt_oss": {"experts.gate_up_proj": "stack", "experts.down_proj": "stack", "experts.gate_up_proj_bias": "bias",
                "experts.down_proj_bias": "bias", "router.weight": "matrix", "router.bias": "bias", "sinks": "vector",
                "q_proj.weight": "matrix", "embed_tokens.weight": "embedding", "lm_head.weight": "head"},
    "cohere": {"q_norm.weight": "norm", "k_norm.weight": "norm", "o_proj.weight": "matrix"},
    "gpt_neox": {"lm_head.weight": "head", "query_key_value.weight": "matrix", "embed_in.weight": "embedding"},
    "gpt2": {"wpe.weight": "embedding", "wte.weight": "embedding", "c_attn.weight": "matrix", "ln_1.weight": "norm"},
    "bart": {"embed_positions.weight": "embedding", "embed_tokens.weight": "embedding", "fc1.weight": "matrix"},
    "mamba": {"A_log": "vector", "conv1d.weight": "stack", "mixer.D": "vector", "in_proj.weight": "matrix"},
    "rwkv": {"time_mix_key": "vector", "key.weight": "matrix", "head.weight": "head"},
    "mixtral": {"experts.gate_up_proj": "stack", "gate.weight": "matrix", "lm_head.weight": "head"},
    "falcon": {"query_key_value.weight": "matrix", "word_embeddings.weight": "embedding"},
    "recurrent_gemma": {"input_gate_bias": "bias", "input_gate_weight": "stack"},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_roles_of_families_that_differ(name: str) -> None:
    more = {"use_qk_norm": True} if name == "cohere" else {"tie_word_embeddings": False} if name == "gpt_neox" else {}
    roles = named_roles(tiny_model(name, **more))
    for ending, role in EXPECTED[name].items():
        found = {r for n, r in roles.items() if n.endswith(ending)}
        assert found == {role}, (ending, found)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["gpt_oss", "cohere", "gpt_neox", "gpt2"])
def test_a_step_without_gradients_moves_what_multiplies_and_nothing_else(name: str, kind: str) -> None:
    """Decay alone. The reference is read off the names that these families give their parameters."""
    model = tiny_model(name, **{"use_qk_norm": True} if name == "cohere" else {})
    for p in model.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    OptimizerSet(model, OptimConfig(kind=kind, lr=0.1, weight_decay=0.5)).step(1.0)
    for n, p in model.named_parameters():
        spared = re.search(r"norm|bias|ln_|sinks|embed_tokens|embed_in|wte|wpe", n)
        assert torch.allclose(p, torch.full_like(p, 1.0 if spared else 0.95)), n


def held_by_muon(model: nn.Module) -> set[str]:
    optimizers = OptimizerSet(model, OptimConfig(kind="muon"))
    muon = next(o for o in optimizers.optimizers if isinstance(o, torch.optim.Muon))
    return {optimizers.names[p] for group in muon.param_groups for p in group["params"]}


def test_muon_trains_matrices_inside_blocks() -> None:
    assert {n.split(".", 4)[-1] for n in held_by_muon(tiny_model("gpt_oss"))} == {
        "router.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight",
    }  # fmt: skip
    assert not any("lm_head" in n for n in held_by_muon(tiny_model("gpt_neox", tie_word_embeddings=False)))


def test_adapters_are_matrices() -> None:
    model = add_adapter(tiny(), LoraConfig(kind="lora", rank=2), seed=0)
    assert {r for n, r in named_roles(model).items() if "lora_" in n} == {"matrix"}


@pytest.mark.slow
def test_no_bias_norm_or_embedding_of_any_family_is_decayed_and_no_head_is_in_muon(capsys) -> None:
    """Over all of transformers' causal language models. Names and class names are the reference, and shapes: what is decayed
    has two dimensions that are more than one."""
    seen = 0
    for family, model in families():
        roles, names = roles_of(model), {p: n for n, p in model.named_parameters()}
        assert roles.keys() == names.keys(), family
        with capsys.disabled():
            print(f"\n{family}: {dict(Counter(roles.values()))}", end="")
        head = model.get_output_embeddings()
        for param, role in roles.items():
            owner, _, leaf = names[param].rpartition(".")
            module = model.get_submodule(owner)
            small = re.search(r"bias|norm|emb|position|A_log|time_mix|^wte|^wpe", leaf) or param.ndim < 2
            small = small or isinstance(module, nn.Embedding) or "Norm" in type(module).__name__
            assert (role not in MATRICES) == bool(small or role == "vector"), (family, names[param], role)
            assert role != "vector" or param.ndim < 2 or re.search(r"A_log|time_mix|scale", leaf), (
                family,
                names[param],
            )
            if head is not None and param is getattr(head, "weight", None):
                assert role in ("head", "embedding"), (family, names[param], role)
        seen += 1
    assert seen > 120
