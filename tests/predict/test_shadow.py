"""`scale export --shadow`: the best predicted weights of a run that trained on untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from scale.api import load_run
from scale.cli.main import main
from scale.predict.shadow import Shadow
from tests.predict.runs import LAST, fit, last, rows, same_bits, tensors, write

INPUT = {"input_ids": torch.arange(12).view(2, 6)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shadow")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return fit(write(folder, "shadow", LAST | {"use": "shadow"}))


@pytest.fixture(scope="module")
def watched(folder: Path) -> Path:
    """The same run with the same draws for the check, none of which moves a weight."""
    return fit(write(folder, "watched", LAST | {"use": "shadow", "guard": LAST["guard"] | {"drift": 1e-9}}))


def offers(run: Path) -> list[float]:
    return [row["prediction"]["shadow"] for row in rows(run) if (row["prediction"] or {}).get("shadow") is not None]


def test_training_goes_on_untouched(run: Path, watched: Path) -> None:
    assert offers(run) and not offers(watched)
    assert same_bits(tensors(run, "model/"), tensors(watched, "model/"))
    assert rows(run)[-1]["ledger"]["predicted"] == 0


def test_the_best_of_all_offers_is_kept(run: Path) -> None:
    found = offers(run)
    assert found == sorted(found, reverse=True)
    assert last(run).state()["stepper"]["predict"]["attempts"]["shadow"]["loss"] == found[-1]


def test_the_export_holds_the_predicted_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, flags in (("trained", []), ("shadow", ["--shadow"])):
        assert main(["export", str(run), "--out", str(tmp_path / name), *flags]) == 0
    exported = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("trained", "shadow")}
    kept = tensors(run, f"predict/{Shadow.KEY}/")
    weights = dict(exported["shadow"].named_parameters(remove_duplicate=False))
    assert kept and all(torch.equal(weights[name.split("/", 2)[2]], tensor) for name, tensor in kept.items())
    trained = dict(exported["trained"].named_parameters(remove_duplicate=False))
    assert any(not torch.equal(trained[name], weight) for name, weight in weights.items())
    with torch.no_grad():
        ours = load_run(run, shadow=True)[0](**INPUT).logits
        assert (ours - exported["shadow"](**INPUT).logits).abs().max() <= 1e-5


def test_a_run_without_predicted_weights_is_named(
    jumping: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(jumping), "--out", str(tmp_path / "out"), "--shadow"]) == 2
    assert "holds no predicted weights (a run with predict.use = 'shadow'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
