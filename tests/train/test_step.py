import math

import pytest
import torch
from torch import nn

from scale.config.optim import OptimConfig, ScheduleConfig, SpikeConfig
from scale.errors import ScaleError
from scale.protocols import Group, Loss, Term
from tests.train.parts import Numbers, Squares, network, stepper


def run(made, source, steps):
    return [made.step(source) for _ in range(steps)]


def weights(made):
    return torch.cat([p.detach().flatten() for p in made.root.model.parameters()])


def test_one_step_against_plain_torch():
    made, source = stepper(optim=OptimConfig(lr=0.05, weight_decay=0.1, clip=0.5), clip=0.5), Numbers(16, micro=4)
    twin = network()
    decay = [p for p in twin.parameters() if p.ndim == 2]
    plain = [p for p in twin.parameters() if p.ndim == 1]
    theirs = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=0.05, betas=(0.9, 0.95)
    )
    stream = Numbers(16)
    for report in run(made, source, 5):
        batch = stream.draw().batches[0]
        loss = (twin(batch["x"]) - batch["y"]).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        theirs.step()
        theirs.zero_grad()
        assert report.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert torch.allclose(
        weights(made), torch.cat([p.detach().flatten() for p in twin.parameters()]), rtol=1e-4, atol=1e-6
    )


def test_eight_micro_batches_equal_one():
    one, eight = stepper(), stepper()
    for a, b in zip(run(one, Numbers(16, 16), 20), run(eight, Numbers(16, 2), 20), strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
        assert a.metrics["mean"] == pytest.approx(b.metrics["mean"], rel=1e-4, abs=1e-6)
        assert (a.forward_passes, b.forward_passes, b.backward_passes) == (1, 8, 8)


def test_uneven_counts_share_one_denominator():
    """Mean of micro-batch means would weigh the small micro-batch as much as the large one."""

    class Masked(Squares):
        def counts(self, batch):
            return {"mse": batch["w"].sum()}

        def __call__(self, model, batch):
            loss = super().__call__(model, batch)
            loss.terms["mse"].total = ((model(batch["x"]) - batch["y"]).square() * batch["w"]).sum()
            loss.terms["mse"].count = batch["w"].sum()
            return loss

    def weigh(batch):
        return batch | {"w": torch.tensor([[1.0]] * 15 + [[0.0]] * 1)}

    damage = {0: weigh}
    a = stepper(objective=Masked()).step(Numbers(16, 16, damage))
    b = stepper(objective=Masked()).step(Numbers(16, 4, damage))
    assert a.loss == pytest.approx(b.loss, rel=1e-6) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)


class TwoTerms:
    """sum(w x) over the elements, weight 3, and 5 w^2 per row, weight 0.5, of a model with the single weight w."""

    def counts(self, batch):
        return {"linear": torch.tensor(batch["x"].numel()), "square": torch.tensor(len(batch["x"]))}

    def __call__(self, model, batch):
        counts, w = self.counts(batch), model.weight.squeeze()
        return Loss(
            {
                "linear": Term((w * batch["x"]).sum(), counts["linear"], weight=3.0),
                "square": Term(5 * w**2 * len(batch["x"]), counts["square"], weight=0.5),
            }
        )


class Fixed(Numbers):
    def draw(self):
        return Group([{"x": torch.tensor([[1.0, 2.0]])}, {"x": torch.tensor([[3.0, 4.0], [5.0, 9.0]])}], tokens=3)


def test_two_weighted_terms_by_hand():
    """w = 2: loss = 3 (2 mean x) + 0.5 (5 x 4) with mean x = 24 / 6; slope = 3 mean x + 0.5 (10 x 2)."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    made = stepper(model, TwoTerms(), clip=0.0)
    report = made.step(Fixed())
    assert report.loss == pytest.approx(3 * 2 * 4 + 0.5 * 5 * 4)
    assert report.grad_norm == pytest.approx(3 * 4 + 0.5 * 10 * 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_step_is_skipped_counted_and_changes_nothing(bad):
    made = stepper()
    source = Numbers(damage={2: lambda b: {"x": b["x"] * bad, "y": b["y"]}})
    run(made, source, 2)
    before = weights(made)
    moments = {k: v.clone() for k, v in made.strategy.tensors().items() if k.startswith("optim/")}
    report = made.step(source)
    assert report.kind == "skipped" and "non-finite" in report.skipped and report.step == 3
    assert torch.equal(before, weights(made))
    assert all(torch.equal(v, made.strategy.tensors()[k]) for k, v in moments.items())
    assert made.step(source).kind == "full" and not torch.equal(before, weights(made))


def test_a_spike_is_skipped():
    source = Numbers(damage={20: lambda b: {"x": b["x"], "y": b["y"] + 1000}})
    made = stepper(spike=SpikeConfig(window=16))
    kinds = [r.kind for r in run(made, source, 22)]
    assert [i for i, kind in enumerate(kinds) if kind == "skipped"] == [20]


def test_lr_follows_the_schedule():
    made = stepper(steps=10, schedule=ScheduleConfig(kind="linear", warmup=2, final=0.0))
    assert [r.lr for r in run(made, Numbers(), 10)] == pytest.approx(
        [0.025, 0.05] + [0.05 * (1 - i / 8) for i in range(1, 9)]
    )


class Masked(Squares):
    """Nothing counts where all x are zero."""

    def counts(self, batch):
        return {"mse": torch.tensor(batch["y"].numel() * int(batch["x"].any()))}


def test_a_batch_with_nothing_to_learn_is_skipped():
    made = stepper(objective=Masked())
    source = Numbers(damage={1: lambda b: {"x": b["x"] * 0, "y": b["y"]}})
    reports = run(made, source, 3)
    assert [r.kind for r in reports] == ["full", "skipped", "full"]
    assert "nothing to learn: mse count 0" in reports[1].skipped and reports[1].backward_passes == 0
    assert [(r.tokens, r.forward_tokens, r.backward_tokens) for r in reports] == [(16,) * 3, (0,) * 3, (16,) * 3]
    assert source.drawn == 3, "the batch was drawn and is not trained on later"


def test_nothing_but_such_batches_is_an_error():
    made = stepper(objective=Masked(), spike=SpikeConfig(max_consecutive=3))
    source = Numbers(damage={i: lambda b: {"x": b["x"] * 0, "y": b["y"]} for i in range(9)})
    with pytest.raises(ScaleError, match="3 steps skipped in a row, the last for nothing to learn"):
        run(made, source, 9)


class Hungry(Squares):
    """Runs out of memory with more than `most` rows, after a random number was drawn."""

    def __init__(self, most):
        self.most = most

    def __call__(self, model, batch):
        loss = super().__call__(model, batch)
        if len(batch["x"]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return loss


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_global_batch():
    made, plain = stepper(objective=Hungry(5)), stepper()
    for ours, theirs in zip(run(made, Numbers(16), 6), run(plain, Numbers(16, 4), 6), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5) and ours.forward_passes == 4
    assert made.events == ["out_of_memory"] * 2 and made.split == 4
    assert torch.allclose(weights(made), weights(plain), rtol=1e-4, atol=1e-6)


def test_a_step_repeated_after_running_out_of_memory_draws_the_same_random_numbers():
    reports = []
    for objective in (Hungry(4), Squares()):
        made = stepper(network(dropout=0.5), objective)
        torch.manual_seed(7)
        reports.append([r.loss for r in run(made, Numbers(16, 4 if objective.__class__ is Squares else 16), 3)])
    assert reports[0] == pytest.approx(reports[1], rel=1e-6)


def test_out_of_memory_with_one_row_says_what_to_do():
    with pytest.raises(ScaleError, match="with a single row"):
        stepper(objective=Hungry(0)).step(Numbers(4))


def test_other_errors_are_not_taken_for_out_of_memory():
    class Broken(Squares):
        def __call__(self, model, batch):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        stepper(objective=Broken()).step(Numbers())


def test_rehearsal_finds_the_micro_batch_before_step_one_and_changes_nothing():
    class Rehearsed(Numbers):
        def rehearse(self):
            return Group([{"x": torch.ones(16, 4), "y": torch.ones(16, 1)}], tokens=16)

    made, source = stepper(network(dropout=0.5), objective=Hungry(8)), Rehearsed()
    before, rng = weights(made), torch.get_rng_state()
    made.rehearse(source)
    assert made.split == 2 and torch.equal(before, weights(made)) and source.drawn == 0
    assert all(p.grad is None for p in made.root.parameters()) and torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("clip", [0.5, 1000.0])
def test_layer_gradients_are_looked_at_every_n_steps_and_add_up_to_the_clipped_norm(clip):
    made = stepper(layer_gradients=2, clip=clip)
    first, second = run(made, Numbers(), 2)
    assert first.layer_gradients == {} and set(second.layer_gradients) == {"0", "3"}
    total = math.sqrt(sum(n**2 for n in second.layer_gradients.values()))
    assert 0.5 < second.grad_norm < 1000  # one clip acts, the other does not
    assert total == pytest.approx(min(second.grad_norm, clip), rel=1e-5)


def test_state_round_trip_continues_bit_for_bit():
    whole, source = stepper(), Numbers()
    run(whole, source, 4)
    tensors = {k: v.clone() for k, v in whole.strategy.tensors().items()}
    state, drawn = whole.state_dict(), source.state_dict()
    expected = [r.loss for r in run(whole, source, 6)]
    again, stream = stepper(network(seed=9)), Numbers()
    blank = again.strategy.blank({k: v.shape for k, v in tensors.items()})
    for name, tensor in blank.items():
        tensor.copy_(tensors[name])
    again.strategy.restore(blank)
    again.load_state_dict(state)
    stream.load_state_dict(drawn)
    assert [r.loss for r in run(again, stream, 6)] == expected


def test_rehearsal_leaves_running_means_alone():
    class Rehearsed(Numbers):
        def rehearse(self):
            return Group([{"x": torch.randn(16, 4) + 5, "y": torch.ones(16, 1)}], tokens=16)

    made = stepper(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)))
    before = {n: b.clone() for n, b in made.root.named_buffers()}
    made.rehearse(Rehearsed())
    assert all(torch.equal(b, before[n]) for n, b in made.root.named_buffers())


def test_out_of_memory_in_the_optimizer_is_one_line(monkeypatch):
    made = stepper()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(made.strategy.optimizer, "step", full)
    with pytest.raises(ScaleError, match="out of memory in the optimizer step"):
        made.step(Numbers())
