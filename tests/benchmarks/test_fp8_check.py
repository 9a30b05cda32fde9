import pytest
import torch
import yaml

from benchmarks import fp8_check
from benchmarks.common import read_csv
from scale.models.fp8_speed import Timing
from tests.conftest import tiny_run

pytest.importorskip("torchao")


@pytest.mark.skipif(torch.cuda.is_available(), reason="would report a speed")
def test_bf16_and_fp8_side_by_side_from_the_same_start(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run(tmp_path)))
    out = tmp_path / "results"
    assert fp8_check.main(["--config", str(path), "--steps", "4", "--smallest", "16", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "no GPU with FP8: emulated, no speed" in printed and "final loss: fp8 - bf16 = " in printed
    rows = read_csv(out / "fp8_check.csv")
    by = {name: [float(r["median"]) for r in rows if r["provider"] == name] for name in ("bf16", "fp8")}
    assert [len(losses) for losses in by.values()] == [4, 4] and {r["metric"] for r in rows} == {"loss"}
    assert by["fp8"] == pytest.approx(by["bf16"], rel=0.02) and by["fp8"] != by["bf16"]
    assert rows[-1]["provider"] == "fp8" and "emulated" in rows[-1]["config"]
    assert float(rows[-1]["ratio"]) == pytest.approx(by["fp8"][-1] / by["bf16"][-1], rel=1e-4)


def test_an_unknown_config_is_an_error_of_the_user(tmp_path, capsys):
    assert fp8_check.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_speeds_of_each_shape(capsys):
    timings = [Timing((64, 32), 3, bf16=2e-6, fp8=1e-6)]
    bf16, fp8 = fp8_check.speed_rows(timings)
    assert (fp8.x, fp8.config, fp8.ratio) == (3, "64 x 32", 0.5) and bf16.provider == "bf16"
    losses = [*fp8_check.summarise("fp8_check", "loss", "", 1, "", {"bf16": [2.0], "fp8": [2.5]}, "bf16")]
    fp8_check.report(losses, timings, emulate=False)
    assert "3 x (64 x 32): bf16 2 us, fp8 1 us, 2.00x" in capsys.readouterr().out
