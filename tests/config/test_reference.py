"""docs/configuration.md says what the schema says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from scale.config import load_config
from scale.config.reference import INTRODUCTION, reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def row(option: str, section: str) -> list[str]:
    """Cells of an option's row: type, default, meaning."""
    text = re.split(r"^#+ ", reference(), flags=re.MULTILINE)
    table = next(part for part in text if part.startswith(section))
    line = next(line for line in table.splitlines() if line.startswith(f"| `{option}` |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")[1:]]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "run: python -m scale.config.reference > docs/configuration.md"
    )


@pytest.mark.parametrize(
    ("section", "option", "cells"),
    [
        ("`optim`", "lr", ["number > 0", "`0.0003`", "Peak learning rate."]),
        ("`optim`", "betas", ["[number ≥ 0 and < 1, number ≥ 0 and < 1]", "`[0.9, 0.95]`"]),
        ("`schedule`", "warmup", ["number ≥ 0 and ≤ 1 or whole number ≥ 2", "`0.02`"]),
        ("`batch`", "micro", ["`auto` or count", "`auto`"]),
        ("`data`", "sources", ["list of [`data.sources[]`](#datasources)", "required"]),
        ("`data.sources[]` of `kind: jsonl`", "columns", ["[`data.sources[].columns`](#datasourcescolumns)", "`{text: text}`"]),
        ("`data.sources[]` of `kind: huggingface`", "max_documents", ["count", "none"]),
        ("`data.tokenizer`", "vocab_size", ["count ≥ 258 and ≤ 1048576", "none"]),
        ("Runs of", "name", ["name", "required"]),
        ("Runs of", "optim", ["[`optim`](#optim)", "its defaults"]),
        ("`monitor`", "progress", ["`true` or `false`", "`true`"]),
    ],
)  # fmt: skip
def test_rows(section: str, option: str, cells: list[str]) -> None:
    assert row(option, section)[: len(cells)] == cells


def test_every_option_has_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert [line for line in rows if line.rstrip("| ").count(" | ") < 3] == []


def test_links_lead_to_headings() -> None:
    headings = re.findall(r"^#+ (.*)$", reference(), flags=re.MULTILINE)
    assert len(headings) == len(set(headings))
    anchors = {"".join(c for c in h.lower() if c.isalnum() or c in "-_ ").replace(" ", "-") for h in headings}
    links = re.findall(r"\]\(#([^)]*)\)", reference())
    assert links and set(links) <= anchors


def test_the_example_is_a_config(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(.*?)```", INTRODUCTION, flags=re.DOTALL)
    assert example is not None
    (tmp_path / "base.yaml").write_text("seed: 7\n")
    (tmp_path / "run.yaml").write_text(example[1])
    assert load_config(tmp_path / "run.yaml").seed == 7
    assert yaml.safe_load(example[1])["extends"] == "base.yaml"
