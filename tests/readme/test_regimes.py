"""The table of docs/prediction.md says what the CSV says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.common import read_csv

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "linear regression": "linear",
    "small network": "network",
    "CNN": "cnn",
    "text, tuned": "text, tuned lr",
    "text, five times": "text, lr 5x too small",
    "LoRA, a recipe": "LoRA, recipe lr",
    "LoRA, tuned": "LoRA, tuned lr",
}


def shown():
    """Cells of the table by config."""
    text = (ROOT / "docs" / "prediction.md").read_text(encoding="utf-8")
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if re.match(r"\| \S.*%.* \|$", line)]
    return {CONFIGS[next(name for name in CONFIGS if row[0].startswith(name))]: row for row in rows}


def percents(cell):
    return [float(x) for x in re.findall(r"[-+]?\d+(?:\.\d+)?(?=%)", cell)]


def test_every_row_of_the_csv_is_shown():
    measured = {row["config"] for row in read_csv(ROOT / "benchmarks" / "results" / "predict_vs_full.csv")}
    assert measured == set(shown()) == set(CONFIGS.values())


@pytest.mark.parametrize("config", CONFIGS.values())
def test_figures_are_those_of_the_csv(config):
    rows = [r for r in read_csv(ROOT / "benchmarks" / "results" / "predict_vs_full.csv") if r["config"] == config]
    ratio = {(r["provider"], r["metric"]): 100 * (float(r["ratio"]) - 1) for r in rows}
    upper = next(100 * float(r["median"]) for r in rows if (r["provider"], r["metric"]) == ("predict", "upper"))
    best = min(value for (name, metric), value in ratio.items() if name.startswith("shorter") and metric == "loss")
    _, seeds, backward, flops, loss, control = shown()[config]
    count = next(r["n"] for r in rows if (r["provider"], r["metric"]) == ("predict", "loss"))
    assert seeds == count
    near = [(percents(backward), [ratio["predict", "backward"]]), (percents(flops), [ratio["predict", "flops"]])]
    near += [(percents(loss), [ratio["predict", "loss"], upper]), (percents(control), [best])]
    for said, found in near:
        assert said == pytest.approx(found, abs=0.051)
