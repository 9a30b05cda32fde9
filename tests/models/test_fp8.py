"""FP8 emulated on a CPU: what is converted, that rounding happens and stays small, and that nothing else changes."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scale.config.model import LoraConfig
from scale.config.run import Fp8Config
from scale.errors import MissingExtra, UsageError
from scale.models import fp8
from scale.models.adapters import add_adapter
from scale.models.fp8 import backend, candidates, convert, exact_products, matrix_shapes
from scale.models.fp8_speed import Timing, speedup
from scale.models.leak import refuse_leaks
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from tests.models.test_build import tiny

pytest.importorskip("torchao")
CONFIG = Fp8Config(smallest=32, emulate=True)
IDS = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(0))


def loss_of(model):
    logits = model(input_ids=IDS, use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def pair(**changes):
    """A model and its copy in FP8."""
    plain = tiny(tie_word_embeddings=False)
    for p in plain.parameters():
        if p.ndim == 2:
            p.data.mul_(4)  # initial weights are so small that the loss would hardly depend on them
    rounded = copy.deepcopy(plain)
    return plain, rounded, convert(rounded, CONFIG.model_copy(update=changes))


def test_what_is_converted_and_why_not_the_rest():
    model = tiny(tie_word_embeddings=False, intermediate_size=72)
    chosen = candidates(model, CONFIG)
    inside = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    attention = [n for n in inside if "self_attn" in n]
    assert list(chosen.names) == attention and len(attention) == 16
    assert chosen.left == {
        "model.embed_tokens": "embedding",
        "lm_head": "output head",
        **{n: "with a side that is no multiple of 16" for n in inside if "mlp" in n},
    }
    assert str(chosen).startswith("16 matrices in FP8, others not: 1 embedding; ")
    small = candidates(model, Fp8Config(smallest=48))
    assert small.left["model.layers.0.self_attn.k_proj"] == "with a side below 48" and len(small.names) == 8
    assert matrix_shapes(model, CONFIG) == {(64, 64): 8, (32, 64): 8}
    assert matrix_shapes(model, Fp8Config()) == {}


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_product_against_rounding_by_hand(recipe):
    """e4m3 reaches 448: values are scaled so that the largest (of the tensor or the row) lies there, then rounded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48, bias=False))
    convert(model, CONFIG.model_copy(update={"recipe": recipe}))
    x, w = torch.randn(16, 32) * torch.logspace(-1, 1, 16)[:, None], model[0].weight.detach()

    def rounded(t):
        amax = t.abs().amax(dim=1, keepdim=True) if recipe == "rowwise" else t.abs().max()
        scale = 448.0 / amax
        if recipe == "rowwise":
            scale = 2.0 ** scale.log2().floor()  # torchao's recipe takes powers of two
        return (t * scale).to(torch.float8_e4m3fn).double() / scale.double()

    expected = rounded(x) @ rounded(w).T
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(x @ w.T, expected.float(), rtol=1e-3)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_loss_and_gradients_are_near_but_not_equal(recipe):
    plain, rounded, _ = pair(recipe=recipe)
    losses = [loss_of(m) for m in (plain, rounded)]
    for loss in losses:
        loss.backward()
    gap = abs(losses[0].item() - losses[1].item())
    assert 0 < gap < 0.02 * losses[0].item()
    for (name, a), b in zip(plain.named_parameters(), rounded.parameters(), strict=True):
        error = (a.grad - b.grad).norm() / a.grad.norm()
        assert 1e-4 < error < 0.25, (name, error)  # e5m2 gradients keep 2 bits of mantissa: up to 1/8 each


def test_parameters_and_checkpoints_do_not_know_of_it(tmp_path):
    plain, rounded, _ = pair()
    assert list(plain.state_dict()) == list(rounded.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in rounded.named_parameters()]
    with torch.no_grad():
        want, have = (m(input_ids=IDS, use_cache=False).logits for m in (plain, rounded))
        assert not torch.equal(want, have)
        save_file({n: t.clone() for n, t in rounded.state_dict().items()}, tmp_path / "model.safetensors")
        fresh = tiny(seed=1, tie_word_embeddings=False)
        fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(fresh(input_ids=IDS, use_cache=False).logits, want)


def test_training_follows_fp32():
    """20 steps on one batch: the loss falls by more than half, and FP8 stays within 3% of the loss at the start."""
    curves = []
    for model in pair()[:2]:
        optimizer, curve = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        for _ in range(20):
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    exact, rounded = curves
    assert exact[-1] < 0.5 * exact[0] and not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.03 * exact[0]


def test_adapters_train_on_a_converted_base():
    grads = []
    for config in (None, CONFIG):
        model = add_adapter(tiny(tie_word_embeddings=False), LoraConfig(kind="lora", rank=4), seed=0)
        if config is not None:
            chosen = convert(model, config)
            assert len(chosen.names) == 28 and all(name.endswith("base_layer") for name in chosen.names)
        loss_of(model).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and all("lora_" in name for name in grads[0])
    for name in grads[0]:
        if "lora_B" in name:  # those of A are zero at the start
            assert 0 < (grads[0][name] - grads[1][name]).norm() / grads[0][name].norm() < 0.25


def test_nothing_to_convert_and_missing_backends(monkeypatch):
    with pytest.raises(UsageError, match=r"compute\.fp8\.smallest = 1024"):
        convert(tiny(), Fp8Config(emulate=True))
    with pytest.raises(UsageError, match=r"compute\.fp8\.recipe = 'rowwise': Transformer Engine"):
        fp8._convert_te(tiny(), Fp8Config(backend="te", recipe="rowwise"), candidates(tiny(), CONFIG))
    here = {"torchao"}
    monkeypatch.setattr(fp8, "installed", lambda name: name in here)
    assert backend(CONFIG) == "torchao" and backend(Fp8Config(backend="te")) is None
    with pytest.raises(MissingExtra, match=r"scale-trainer\[te\]"):
        convert(tiny(), Fp8Config(backend="te", smallest=32))
    here.clear()
    here.add("transformer_engine")
    assert backend(CONFIG) == "te"


def test_speedup_weighs_each_shape_by_how_often_it_occurs():
    slow, fast = Timing((64, 64), 3, bf16=1.0, fp8=2.0), Timing((4096, 4096), 1, bf16=10.0, fp8=5.0)
    assert (slow.speedup, fast.speedup) == (0.5, 2.0)
    assert speedup([slow, fast]) == pytest.approx(13 / 11)
    assert speedup([slow]) == 0.5 and speedup([]) == 1.0


def test_a_probe_for_leaks_sees_exact_products():
    """Documents share the scales of their rows, so that FP8 alone looks like a leak; a real one still shows."""
    _, rounded, _ = pair()
    root = Root(rounded, CausalLM())
    with pytest.raises(UsageError, match="see each other"):
        refuse_leaks(root, 100)
    before = rounded(input_ids=IDS, use_cache=False).logits
    with exact_products(rounded):
        refuse_leaks(root, 100)
        crossing = lambda model, batch: model(input_ids=batch["input_ids"], use_cache=False).logits  # noqa: E731
        root.objective.logits = crossing
        with pytest.raises(UsageError, match="see each other"):
            refuse_leaks(root, 100)
    assert torch.equal(rounded(input_ids=IDS, use_cache=False).logits, before)
