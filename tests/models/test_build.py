import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from scale.config.model import LoraConfig, ModelConfig
from scale.errors import UsageError
from scale.models.adapters import add_adapter
from scale.models.build import build_model, materialise, set_recompute
from scale.models.hf_config import model_config
from scale.models.size import flops_per_token, model_size

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
INPUT = {"input_ids": torch.arange(12).view(2, 6), "use_cache": False}


def tiny(seed=0, **overrides):
    config = ModelConfig(preset="tiny", overrides=SMALL | overrides)
    hf = model_config(config, vocab_size=100)
    model, weights = build_model(config, hf, "sdpa", seed)
    assert next(model.parameters()).device.type == "meta"
    materialise(model, weights, torch.device("cpu"))
    return model


def test_initial_weights_do_not_depend_on_the_order_in_which_they_are_made():
    config = ModelConfig(preset="tiny", overrides=SMALL)
    model, weights = build_model(config, model_config(config, 100), "sdpa", 7)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    forward = {n: weights(n, shapes[n]) for n in shapes}
    backward = {n: weights(n, shapes[n]) for n in reversed(shapes)}
    assert all(torch.equal(forward[n], backward[n]) for n in shapes)


def test_initial_weights_have_the_intended_spread():
    model = tiny(hidden_size=256, intermediate_size=512)
    spread = {n.split(".")[-2]: p.std().item() for n, p in model.named_parameters() if p.ndim == 2}
    assert spread["q_proj"] == pytest.approx(0.02, rel=0.02) and spread["embed_tokens"] == pytest.approx(0.02, rel=0.02)
    for writer in ("down_proj", "o_proj"):
        assert spread[writer] == pytest.approx(0.02 / 8**0.5, rel=0.02)
    assert all(torch.equal(p, torch.ones_like(p)) for p in model.parameters() if p.ndim == 1)


def test_a_materialised_model_computes_what_a_normally_built_one_does():
    """The rotary buffers are not in the state dict: a meta model would otherwise rotate by garbage."""
    ours = tiny()
    theirs = LlamaForCausalLM(ours.config)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(**INPUT).logits, theirs.eval()(**INPUT).logits)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_seeds_differ():
    assert not torch.equal(tiny(0).lm_head.weight, tiny(1).lm_head.weight)


def test_recompute_runs_every_kth_layer_twice_and_gives_the_same_gradients():
    plain, again = tiny(), tiny()
    assert set_recompute(again, 2) == 2
    calls = [0] * 4
    for i, layer in enumerate(again.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    for model in (plain, again):
        model.train()
        model(**INPUT).logits.square().sum().backward()
    assert calls == [2, 1, 2, 1]
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_recompute_of_a_model_without_such_layers_is_refused():
    with pytest.raises(UsageError, match="Linear does not support it"):
        set_recompute(torch.nn.Linear(2, 2), 2)


def test_pretrained_weights_come_from_a_folder_and_random_ones_do_not(tmp_path):
    source = tiny(3)
    source.save_pretrained(tmp_path / "m")
    config = ModelConfig(path=str(tmp_path / "m"))
    loaded, weights = build_model(config, model_config(config), "sdpa", 0)
    assert weights is None and torch.equal(loaded.lm_head.weight, source.lm_head.weight)
    config = ModelConfig(path=str(tmp_path / "m"), init="random", overrides={"num_hidden_layers": 2})
    fresh, _ = build_model(config, model_config(config), "sdpa", 0)
    assert len(fresh.model.layers) == 2 and not torch.equal(fresh.lm_head.weight, source.lm_head.weight)


def test_pickled_weights_are_refused(tmp_path):
    source = tiny()
    source.config.save_pretrained(tmp_path / "m")
    torch.save(source.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UsageError, match="safetensors"):
        build_model(config := ModelConfig(path=str(tmp_path / "m")), model_config(config), "sdpa", 0)


def test_lora_trains_only_adapters_and_starts_as_the_base():
    base = tiny()
    with torch.no_grad():
        before = base(**INPUT).logits
    model = add_adapter(base, LoraConfig(kind="lora", rank=2, targets=["q_proj", "down_proj"]), seed=1)
    with torch.no_grad():
        assert torch.equal(model(**INPUT).logits, before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * 2 * 2 and all("lora_" in n for n in trained)
    assert model_size(model).trainable == 4 * 2 * ((64 + 64) + (96 + 64))


def test_a_lora_target_that_is_not_there_is_named():
    with pytest.raises(UsageError, match=r"'qproj' is no linear module.*q_proj"):
        add_adapter(tiny(), LoraConfig(kind="lora", targets=["q_proj", "qproj"]), seed=0)


def test_flops_against_a_count_by_hand():
    model = tiny()
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    matrices = 4 * layer + 128 * 64  # the tied head multiplies, the embedding looks up
    assert model_size(model).matrix == matrices
    assert flops_per_token(model_size(model), model.config, 32) == 6 * matrices + 12 * 4 * 4 * 16 * 32


def test_flops_of_frozen_weights_have_no_weight_gradient():
    model = tiny()
    full = flops_per_token(model_size(model), model.config, 32)
    model.model.layers.requires_grad_(False)
    frozen = sum(p.numel() for p in model.model.layers.parameters())
    assert full - flops_per_token(model_size(model), model.config, 32) == 2 * frozen


def test_biases_of_a_preset_start_at_zero():
    model = tiny(attention_bias=True)
    biases = [p for n, p in model.named_parameters() if n.endswith(".bias")]
    assert biases and all(not b.any() for b in biases)


def test_overrides_are_fields_and_never_options_of_the_loader(tmp_path):
    tiny().save_pretrained(tmp_path / "m")
    with pytest.raises(UsageError, match=r"trust_remote_code: LlamaConfig has no such field"):
        model_config(ModelConfig(path=str(tmp_path / "m"), init="random", overrides={"trust_remote_code": True}))
    changed = ModelConfig(path=str(tmp_path / "m"), init="random", overrides={"num_hidden_layers": 3})
    assert model_config(changed).num_hidden_layers == 3


def materialised_from_files(folder):
    config = ModelConfig(path=str(folder))
    said = []
    model, weights = build_model(config, model_config(config), "sdpa", 0, lazy=True, say=said.append)
    if weights is not None:
        assert all(p.is_meta for p in model.parameters())
        materialise(model, weights, torch.device("cpu"))
    return model, weights, said


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", ["1GB", "60KB"])
def test_stored_weights_are_read_one_by_one_and_are_those_of_a_normal_load(tmp_path, shards, tied):
    source = tiny(3, tie_word_embeddings=tied).to(torch.bfloat16)
    source.save_pretrained(tmp_path / "m", max_shard_size=shards)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shards == "60KB")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    ours, weights, said = materialised_from_files(tmp_path / "m")
    assert weights is not None and said == []
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(ours.eval()(**INPUT).logits, theirs(**INPUT).logits)


def test_files_that_do_not_fit_one_to_one_are_loaded_whole_with_the_reason(tmp_path):
    source = tiny(3)
    source.save_pretrained(tmp_path / "m")
    old = {k.removeprefix("model."): v.clone() for k, v in source.state_dict().items() if k != "lm_head.weight"}
    save_file(old, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})  # a base model without its prefix
    model, weights, said = materialised_from_files(tmp_path / "m")
    assert weights is None and torch.equal(model.lm_head.weight, source.lm_head.weight)
    assert len(said) == 1 and "every rank loads the whole model (its files have no model." in said[0]
