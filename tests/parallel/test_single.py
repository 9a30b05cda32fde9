import pytest
import torch
from torch import nn

from scale.config.optim import OptimConfig
from scale.errors import ScaleError
from scale.objectives.root import Root
from scale.parallel.single import Single
from tests.train.parts import Numbers, Squares, network, stepper

ADAMW = OptimConfig()


def prepared(model=None, optim=ADAMW):
    strategy = Single()
    return strategy, strategy.prepare(Root(model or network(), Squares()), optim, None)


def test_a_frozen_reference_has_no_optimizer_and_no_gradients():
    _, root = prepared(optim=None)
    assert not root.training and not any(p.requires_grad for p in root.parameters())


def test_edited_masters_change_the_next_loss():
    strategy, root = prepared()
    batch = Numbers().draw().batches[0]
    before = root(batch).terms["mse"].total.item()
    with strategy.edit_masters() as shards:
        assert shards["0.weight"].global_shape == (8, 4) and shards["0.weight"].offset == 0
        shards["3.bias"].param += 1.0
    out = root.model(batch["x"])
    after = root(batch).terms["mse"].total.item()
    assert after == pytest.approx((out - batch["y"]).square().sum().item()) and after != before


def test_a_veto_leaves_weights_alone_and_drops_gradients():
    made = stepper()
    made._gradients(Numbers().draw())
    before = [p.detach().clone() for p in made.root.parameters()]
    seen = []
    update = made.strategy.update(1.0, 1.0, observe=seen.append, veto=lambda norm: "because")
    assert update.skipped == "because" and update.grad_norm > 0 and seen == []
    assert all(torch.equal(a, b) for a, b in zip(before, made.root.parameters(), strict=True))
    assert all(p.grad is None for p in made.root.parameters())


def test_observe_sees_clipped_gradients_before_the_step():
    made = stepper()
    made._gradients(Numbers().draw())
    before = {n: p.detach().clone() for n, p in made.root.model.named_parameters()}
    seen = {}

    def observe(shards):
        seen["norm"] = torch.stack([s.grad.norm() for s in shards.values()]).norm()
        seen["same"] = all(torch.equal(s.param, before[n]) for n, s in shards.items())

    update = made.strategy.update(1.0, 0.01, observe, None)
    assert float(seen["norm"]) == pytest.approx(0.01, rel=1e-4) and seen["same"] and update.grad_norm > 0.01


class WithBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        return self.head(self.norm(self.frozen(x)))


def test_canonical_state_holds_what_training_changes_and_nothing_frozen():
    made = stepper(WithBuffer())
    made.step(Numbers())
    names = {n for n in made.strategy.tensors() if n.startswith("model/")}
    assert names == {"model/norm.weight", "model/norm.bias", "model/norm.running_mean", "model/norm.running_var",
                     "model/norm.num_batches_tracked", "model/head.weight", "model/head.bias"}  # fmt: skip


def test_a_state_that_does_not_fit_is_refused_by_name():
    strategy, _ = prepared()
    shapes = {k: v.shape for k, v in strategy.tensors().items()}
    with pytest.raises(ScaleError, match=r"only the checkpoint has extra\.weight"):
        strategy.blank(shapes | {"model/extra.weight": torch.Size([1])})
    with pytest.raises(ScaleError, match=r"only the model has 0\.weight"):
        strategy.blank({k: v for k, v in shapes.items() if k != "model/0.weight"})
    with pytest.raises(ScaleError, match=r"0\.weight: checkpoint \(2, 2\), model \(8, 4\)"):
        strategy.blank(shapes | {"model/0.weight": torch.Size([2, 2])})


def test_bf16_computes_in_bf16_around_fp32_weights():
    strategy = Single("cpu", "bf16")
    seen = []

    class Spy(Squares):
        def __call__(self, model, batch):
            seen.append(model(batch["x"]).dtype)
            return super().__call__(model, batch)

    root = strategy.prepare(Root(network(), Spy()), OptimConfig(), None)
    root(Numbers().draw().batches[0])
    assert seen == [torch.bfloat16] and {p.dtype for p in root.parameters()} == {torch.float32}


def test_full_params_are_all_parameters():
    strategy, root = prepared()
    assert {n: tuple(p.shape) for n, p in strategy.full_params()} == {
        n: tuple(p.shape) for n, p in root.model.named_parameters()
    }


def test_a_reference_beside_the_trained_model_does_not_take_its_place():
    made = stepper()
    names = set(made.strategy.tensors())
    made.strategy.prepare(Root(network(1), Squares()), None, None)
    assert set(made.strategy.tensors()) == names
    assert torch.equal(dict(made.strategy.full_params())["0.weight"], made.root.model[0].weight)
