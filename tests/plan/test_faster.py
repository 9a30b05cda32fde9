"""Advice where a plan fits: what is said of a setting is what a plan made with it says, and what an estimate by hand gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from scale.cards import CARDS
from scale.cli.main import main
from scale.config import load_config
from scale.plan import plan as planning
from scale.plan.advice import changed_config
from scale.plan.faster import faster
from scale.plan.plan import Plan, make_plan
from scale.plan.settle import planned
from scale.plan.speed import HOST, LINKS, NETWORK, PRODUCTS, seconds_for_each_byte, step_seconds

Make = Callable[..., Path]
LARGE = {"preset": "tiny", "overrides": {"vocab_size": 512, "num_hidden_layers": 2}}


def followed(path: Path, words: list[str], change: str, gpus: int) -> Plan:
    """The plan of the config with the advice typed after it."""
    return make_plan(load_config(path, [*words, *change.split()]), gpus, planned("h100"))


@pytest.mark.parametrize(("gpus", "words"), [(1, []), (2, ["compute.recompute=1"]), (16, ["batch.sequences=64"])])
def test_followed_advice_gives_what_it_says(make_config: Make, gpus: int, words: list[str]) -> None:
    path = make_config(model=LARGE)
    words = ["batch.micro=1", *words]
    plan = followed(path, words, "", gpus)
    knobs = faster(plan)
    assert knobs and knobs == sorted(knobs, key=lambda knob: -(knob.speedup or 0))
    for knob in knobs:
        again = followed(path, words, knob.change, gpus)
        assert again.fits and (again.memory.peak, again.fits) == (knob.peak, knob.fits)
        assert knob.speedup == pytest.approx(plan.seconds / again.seconds) and knob.speedup > 1
    alone = [knob for knob in knobs if knob.change.startswith("batch.micro=") and " " not in knob.change]
    assert len(alone) == 1 and int(alone[0].change.removeprefix("batch.micro=")) > 1


def test_a_larger_micro_batch_that_would_not_fit_is_not_advised(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for about four rows of eight."""
    path, words = make_config(model=LARGE), ["batch.micro=1", "compute.loss=full"]
    four, eight = (followed(path, words, f"batch.micro={n}", 1).memory.peak for n in (4, 8))
    monkeypatch.setattr(planning, "USABLE", (four + 0.3 * (eight - four)) / planned("h100").memory)
    plan = followed(path, words, "", 1)
    assert [knob.change for knob in faster(plan)] == ["batch.micro=4"]


def test_nothing_is_advised_where_the_step_is_one_micro_batch(make_config: Make) -> None:
    assert faster(followed(make_config(model=LARGE), ["batch.micro=8"], "", 1)) == []


def test_a_plan_that_does_not_fit_gets_no_speed(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "USABLE", 1e-9)
    assert faster(followed(make_config(model=LARGE), ["batch.micro=1"], "", 1)) == []


def test_less_recomputation_is_advised_with_its_worth(make_config: Make) -> None:
    path = make_config(model=LARGE)
    plan = followed(path, ["batch.micro=8", "compute.recompute=1"], "", 1)
    heavy = replace(
        plan, bill=replace(plan.bill, forward=1e12, backward=2e12, moved=0.0)
    )  # products are all that counts
    off = followed(path, ["batch.micro=8", "compute.recompute=off"], "", 1)
    light = replace(off, bill=replace(heavy.bill, again=0.0))
    assert heavy.bill.again == 1.0 and off.bill.again == 0.0
    assert heavy.seconds / light.seconds == pytest.approx(4 / 3, rel=1e-3)  # forward twice and backward, against three


def test_seconds_by_hand(make_config: Make) -> None:
    """One GPU: a heavy step is its products; a light one is the CPU issuing kernels, for each micro-batch and layer."""
    plan = followed(make_config(model=LARGE), ["batch.micro=2"], "", 1)
    assert step_seconds(plan.settled, plan.bill) == pytest.approx(4 * 2 * HOST, rel=0.05)
    heavy = replace(plan.bill, forward=2e12, backward=4e12, moved=0.0)
    assert step_seconds(plan.settled, heavy) == pytest.approx(6e12 * 8 * 64 / (989e12 * PRODUCTS), rel=1e-3)


def test_flops_of_the_bill_are_those_of_the_plan(make_config: Make) -> None:
    bill = followed(make_config(model=LARGE), [], "", 1).bill
    assert bill.backward == pytest.approx(2 * bill.forward) and bill.trained == 1.0


def test_links_by_hand(make_config: Make) -> None:
    settled = followed(make_config(model=LARGE), ["batch.micro=1"], "", 1).settled
    assert seconds_for_each_byte(settled, 8) == pytest.approx(7 / 8 / (450e9 * LINKS))  # NVLink of one machine
    many = seconds_for_each_byte(settled, 64)  # 56 of 64 parts come through the eight network ports of a machine
    assert many == pytest.approx(56 / 64 / (8 * NETWORK * LINKS))
    slow = replace(settled, hardware=planned("4090"))
    assert seconds_for_each_byte(slow, 8) == pytest.approx(7 / 8 / (32e9 * LINKS))


def test_weights_that_stay_gathered_save_an_exchange(make_config: Make) -> None:
    path = make_config(model=LARGE)
    plan = followed(path, ["batch.micro=1"], "", 8)
    bound = replace(plan.bill, layer=1e9, forward=1.0, backward=1.0, moved=0.0)  # links are all that counts
    config = changed_config(plan.settled.config, {"compute.fsdp.reshard": False})
    kept = replace(plan.settled, config=config)
    assert step_seconds(kept, bound) < step_seconds(plan.settled, bound)


def test_every_card_has_a_link_below_its_memory() -> None:
    assert all(0 < card.link < card.bandwidth for card in CARDS.values())


def test_table_and_json_say_it(make_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(make_config(model=LARGE)), "--gpus", "1", "--gpu", "h100", "batch.micro=1"]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "an estimate, nothing was measured" in out and "x as fast: batch.micro=8" in out
    assert "MiB" in out and "(MiB)" in out and "GiB" not in out  # a tiny model
    assert main(["plan", *words, "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert advice[0].keys() == {"change", "peak", "fits", "speedup"} and advice[0]["speedup"] > 1


@pytest.mark.slow
def test_7b_on_64_cards_uses_them() -> None:
    plan = make_plan(load_config("configs/pretrain/7b.yaml"), 64, planned("h100"))
    knobs = faster(plan)
    assert plan.memory.peak < 0.4 * plan.usable < 0.5 * plan.usable < knobs[0].peak <= plan.usable
    again = make_plan(load_config("configs/pretrain/7b.yaml", knobs[0].change.split()), 64, planned("h100"))
    assert again.memory.peak == knobs[0].peak and again.fits
