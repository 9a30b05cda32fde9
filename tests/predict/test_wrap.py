"""predict.wrap around a plain torch loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from scale.config.predict import PredictConfig
from scale.errors import UsageError
from scale.predict import wrap

JUMPS: dict[str, Any] = {
    "warmup": 10,
    "min_full": 3,
    "horizons": [16],
    "directions": ["optimizer"],
    "coefficients": "line",
    "confidence": 0,
    "guard": {"correction_interval": 4, "settle_steps": 2, "drift": 1.0},
}


class Line:
    """Linear regression with a learning rate far too small, and its loop."""

    def __init__(self, steps: int, config: dict[str, Any] | None):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(200, 8, generator=generator)
        self.y = self.x @ torch.randn(8, 1, generator=generator)
        torch.manual_seed(0)
        self.model = nn.Linear(8, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.calls = self.checks = 0
        self.predictor = None
        if config is not None:
            self.predictor = wrap(
                self.model, self.optimizer, steps=steps, check=self.check, config=config, tokens=150, check_tokens=50
            )

    def check(self) -> torch.Tensor:
        assert not self.model.training and not torch.is_grad_enabled()
        self.checks += 1
        return (self.model(self.x[150:]) - self.y[150:]).square().mean()

    def closure(self) -> torch.Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        loss = (self.model(self.x[:150]) - self.y[:150]).square().mean()
        loss.backward()
        return loss

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            if self.predictor is None:
                losses.append(float(self.closure().detach()))
                self.optimizer.step()
            else:
                losses.append(self.predictor.step(self.closure).loss)
        return losses


def test_observing_changes_no_bit() -> None:
    plain, watched = Line(60, None), Line(60, {"mode": "observe"})
    assert plain.run(60) == watched.run(60)
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_jumps_save_backward_passes_and_end_no_worse() -> None:
    plain, jumping = Line(300, None), Line(300, JUMPS)
    plain.run(300)
    losses = jumping.run(300)
    assert jumping.predictor is not None and jumping.predictor.steps_done == 300
    assert jumping.calls < 200 and jumping.calls == jumping.predictor.ledger["full"]
    assert sum(loss != loss for loss in losses) == 300 - jumping.calls == jumping.predictor.ledger["predicted"]
    plain.model.eval(), jumping.model.eval()
    with torch.no_grad():
        assert jumping.check() <= plain.check()


def test_state_goes_on_exactly() -> None:
    whole = Line(120, JUMPS)
    whole.run(120)
    first = Line(120, JUMPS)
    first.run(47)
    second = Line(120, JUMPS)
    assert first.predictor is not None and second.predictor is not None and whole.predictor is not None
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.predictor.load_state_dict(first.predictor.state_dict())
    second.run(73)
    assert torch.equal(second.model.weight, whole.model.weight)
    assert second.predictor.ledger == whole.predictor.ledger


def test_each_check_counts_as_one_forward_pass() -> None:
    line = Line(120, JUMPS)
    assert line.predictor is not None
    reports = [line.predictor.step(line.closure) for _ in range(120)]
    assert line.checks == line.predictor.ledger["check_forwards"] > 10
    assert sum(report.forward_passes for report in reports) == line.calls + line.checks
    assert sum(report.forward_tokens for report in reports) == 150 * line.calls + 50 * line.checks


def test_a_check_leaves_every_part_in_its_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    model[1].eval()  # frozen while the rest trains
    seen: list[bool] = []

    def check() -> float:
        seen.append(any(part.training for part in model.modules()))
        return 5.0 - len(seen)

    def closure() -> torch.Tensor:
        assert [part.training for part in model.modules()] == [True, True, False, True]
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.ones(3, 2)).square().mean()
        loss.backward()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    predictor = wrap(model, optimizer, steps=40, check=check, config=JUMPS)
    for _ in range(40):
        predictor.step(closure)
    assert seen and not any(seen)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"enabled": False}, r"predict.wrap: enabled = False: .*leave it out"),
        (PredictConfig(enabled=False), r"predict.wrap: enabled = False: .*leave it out"),
        ({"selection": {"kind": "history"}}, r"predict.wrap: selection.kind = 'history': .* only 'off'"),
        ({"guard": {"tokens": 512}}, r"predict.wrap: guard.tokens = 512: .* check_tokens"),
        ({"warmpu": 3}, r"predict.wrap: config: warmpu = 3: "),
        ({"horizons": [0], "guard": {"settle_steps": 0}}, r"config: horizons.0 = 0: .*; guard.settle_steps = 0: "),
    ],
)
def test_what_has_no_meaning_around_a_loop_is_refused(config: dict[str, Any] | PredictConfig, said: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=said) as error:
        wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=10, check=lambda: 0.0, config=config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [None, {}, {"enabled": True}, PredictConfig(), PredictConfig(enabled=True)])
def test_to_wrap_is_to_enable(config: dict[str, Any] | PredictConfig | None) -> None:
    model = nn.Linear(2, 2)
    assert wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=10, check=lambda: 0.0, config=config)


def test_other_masters_than_fp32_are_refused() -> None:
    model = nn.Linear(2, 2).bfloat16()
    with pytest.raises(UsageError, match=r"weight is torch.bfloat16: masters in float32"):
        wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=10, check=lambda: 0.0)


def test_arguments_that_fit_nothing_are_refused() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"steps = 0, tokens = 1, check_tokens = 1: 1 or more each"):
        wrap(model, optimizer, steps=0, check=lambda: 0.0)
    with pytest.raises(UsageError, match=r"parameters that are not the model's"):
        wrap(model, torch.optim.SGD(other.parameters(), lr=0.1), steps=10, check=lambda: 0.0)


EXTRAPOLATION = JUMPS | {
    "mode": "always", "min_full": 2, "extrapolation_ratio": 3, "extrapolation_steps": 6,
    "guard": {"correction_interval": 3, "settle_steps": 2, "drift": 9.0, "tolerance": 0.5, "discount": 0.5},
}  # fmt: skip


def test_extrapolation_around_a_loop_and_going_on_in_their_middle() -> None:
    whole, half = Line(60, EXTRAPOLATION), Line(60, EXTRAPOLATION)
    losses = whole.run(60)
    assert whole.predictor is not None and half.predictor is not None
    ledger = whole.predictor.ledger
    assert ledger["accepted"] >= 2 and ledger["predicted"] >= 12 and ledger["full"] + ledger["predicted"] == 60
    early = half.run(15)
    saved = half.predictor.state_dict()
    assert saved["state"]["predict"]["cycle"]["phase"] == "extrapolate"
    rest = Line(60, EXTRAPOLATION)
    rest.model.load_state_dict(half.model.state_dict())
    rest.optimizer.load_state_dict(half.optimizer.state_dict())
    assert rest.predictor is not None
    rest.predictor.load_state_dict(saved)
    assert str(early + rest.run(45)) == str(losses) and rest.predictor.ledger == ledger
    assert torch.equal(rest.model.weight, whole.model.weight)
    with pytest.raises(UsageError, match="all 60 steps are done"):
        whole.run(1)
