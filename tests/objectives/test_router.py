"""The load balancing loss that a config asks for: transformers' own value of a row, one value for any micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from scale.config.optim import OptimConfig, ScheduleConfig
from scale.data.rows import IGNORE
from scale.errors import UsageError
from scale.models.build import set_recompute
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.objectives.router import router_loss
from scale.parallel.single import Single
from scale.protocols import Group
from scale.train.step import BackwardStepper, StepSettings
from tests.models.families import tiny_model

ASKED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
ROW = 12


def mixture(name: str = "mixtral", **more: object) -> nn.Module:
    asked = {"output_router_logits": True, "aux_loss_coef": 0.5} if name == "jetmoe" else ASKED
    model = tiny_model(name, **asked, **more).double().train()
    model.set_experts_implementation("eager")  # the default multiplies in fp32 at most
    return model


def rows(count: int, padded: bool = False) -> dict[str, Tensor]:
    """Rows of one document, or of two and padding (as many tokens of it as the row's number)."""
    ids_BL = torch.randint(0, 96, (count, ROW), generator=torch.Generator().manual_seed(1))
    targets_BL = ids_BL.roll(-1, 1)
    targets_BL[:, -1] = 7
    position_BL = torch.arange(ROW).repeat(count, 1)
    if padded:
        position_BL[:, 5:] -= 5
        for b in range(count):
            targets_BL[b, ROW - b :] = IGNORE
        targets_BL[:, 1] = IGNORE  # read, not learned: it counts
    segments_BL = (torch.arange(ROW) >= 5).long().repeat(count, 1) * padded
    return {"input_ids": ids_BL, "targets": targets_BL, "position_ids": position_BL, "segment_ids": segments_BL}


FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "gpt_oss", "granitemoe", "granitemoeshared", "phimoe",
            "jetmoe", "minimax", "minimax_m2", "ernie4_5_moe", "jamba", "laguna", "mellum",
            "granitemoe_swa"]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_of_one_row_it_is_the_loss_that_transformers_computes(name: str) -> None:
    model = mixture(name)
    batch, router = rows(1), router_loss(model)
    torch.manual_seed(0)
    out = CausalLM(router=router)(model, batch)
    labels_BL = torch.cat([batch["input_ids"][:, :1], batch["targets"]], 1)[:, :-1]
    torch.manual_seed(0)  # jitter, where there is any
    theirs = model(input_ids=batch["input_ids"], labels=labels_BL, use_cache=False)
    ours = out.terms["router"]
    assert ours.weight == 0.5 and int(ours.count) == ROW
    assert (ours.total / ours.count).item() == pytest.approx(theirs.aux_loss.item(), rel=1e-6)  # theirs: sums in fp32
    own = (nn.functional.cross_entropy(theirs.logits[0], batch["targets"][0]) + 0.5 * theirs.aux_loss).item()
    assert sum((t.weight * t.total / t.count).item() for t in out.terms.values()) == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_rows_count_by_their_tokens_and_padding_does_not(name: str, loss: str) -> None:
    model = mixture(name)
    batch, router = rows(3, padded=True), router_loss(model)
    seen: list[Tensor] = []
    gates = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    hooks = [gate.register_forward_hook(lambda _, __, out: seen.append(out[0])) for gate in gates]
    term = CausalLM(loss=loss, router=router)(model, batch).terms["router"]
    for hook in hooks:
        hook.remove()
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(3):
        mask_1L = (torch.arange(ROW) < ROW - b)[None]
        of_row = tuple(logits.view(3, ROW, -1)[b] for logits in seen)
        expected += (ROW - b) * load_balancing_loss_func(of_row, 4, 2, mask_1L).double()
    assert int(term.count) == 3 * ROW - 3
    assert term.total.item() == pytest.approx(expected.item(), rel=1e-6)


def gradients(model: nn.Module, objective: CausalLM, batches: list[dict[str, Tensor]]) -> Tensor:
    model.zero_grad()
    counts = [objective.counts(batch) for batch in batches]
    for batch in batches:
        out = objective(model, batch)
        assert {n: int(t.count) for n, t in out.terms.items()} == {
            n: int(c) for n, c in objective.counts(batch).items()
        }
        sum(t.weight * t.total / sum(c[n] for c in counts) for n, t in out.terms.items()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_eight_micro_batches_of_one_row_are_one_of_eight(name: str) -> None:
    model, batch = mixture(name), rows(8, padded=True)
    objective = CausalLM(router=router_loss(model))
    whole = gradients(model, objective, [batch])
    parts = gradients(model, objective, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(8)])
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
    model.config.output_router_logits = False
    without = gradients(model, CausalLM(), [batch])
    assert (whole - without).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("change", ["chunked", "one_row", "recompute"])
def test_ways_to_compute_give_the_same_gradients(change: str) -> None:
    model, batch = mixture(), rows(2)  # rows of one document: sdpa has no boundaries within a single row
    plain = gradients(model, CausalLM(router=router_loss(model)), [batch])
    if change == "recompute":
        assert set_recompute(model, 1) == 2
    loss = "chunked" if change == "chunked" else "full"
    again = gradients(model, CausalLM(loss=loss, one_row=change == "one_row", router=router_loss(model)), [batch])
    torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-12)


def test_it_is_trained_shown_and_not_part_of_held_out_losses() -> None:
    model = mixture().float()
    objective = CausalLM(router=router_loss(model))
    strategy = Single("cpu")
    root = strategy.prepare(Root(model, objective), OptimConfig(lr=1e-2), None)
    settings = StepSettings(steps=20, lr=1e-2, schedule=ScheduleConfig(kind="constant", warmup=0))

    class Rows:
        def draw(self) -> Group:
            batch = rows(4)
            return Group([batch], tokens=4 * ROW)

        def publish(self, version, params) -> None: ...

    stepper = BackwardStepper(root, objective, strategy, settings)
    reports = [stepper.step(Rows()) for _ in range(20)]
    for report in reports:
        shown = report.metrics
        assert report.loss == pytest.approx(shown["lm_loss"] + 0.5 * shown["router_loss"], rel=1e-6)
    assert reports[-1].metrics["router_loss"] < reports[0].metrics["router_loss"]
    score = stepper.score(Rows().draw())
    objective.router = None
    assert score == stepper.score(Rows().draw())


def test_nothing_is_asked_for_and_losses_that_are_not_computed_are_refused() -> None:
    assert router_loss(tiny_model("mixtral")) is None and router_loss(tiny_model("llama")) is None
    with pytest.raises(UsageError, match=r"output_router_logits = true: no router loss is computed for doge"):
        router_loss(tiny_model("doge", output_router_logits=True))
    with pytest.raises(UsageError, match=r"z_loss_coefficient = 0.1: no such loss is computed for bamba"):
        model = tiny_model("llama")
        model.config.z_loss_coefficient, model.config.model_type = 0.1, "bamba"
        router_loss(model)
