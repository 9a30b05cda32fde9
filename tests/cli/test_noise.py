"""Every verb in a process of its own, in the repository root: on stdout its result, on stderr lines of ours alone."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = re.compile(r"(tracing a step|trying |scale: |step \d+/|completed: |tokenizing|training a tokenizer)")

THEIRS = re.compile(
    r"UserWarning|FutureWarning|\[transformers\]|\[WARNING\]|\[INFO\]|Failed to load|^W\d{4} ", re.MULTILINE
)


def said(*words: str) -> tuple[str, list[str]]:
    """Stdout, and the lines of stderr that are not ours."""
    program = [sys.executable, "-m", "scale.cli.main", *words]
    ran = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, [line for line in ran.stderr.splitlines() if line.strip() and not OURS.match(line)]


@pytest.mark.slow
def test_verbs_print_what_is_theirs(make_config: Callable[..., Path], tmp_path: Path) -> None:
    config, run = str(make_config()), str(tmp_path / "runs" / "tiny")
    verbs = [
        ["plan", config, "model.overrides.vocab_size=320", "--gpus", "2", "--gpu", "h100"],
        ["train", config, "name=zero", "compute.strategy=deepspeed", "--dry-run"],
        ["train", config, "--dry-run"],
        ["train", config, "train.steps=60"],
        ["doctor"],
        ["export", run, "--out", str(tmp_path / "out")],
        ["generate", run, "--prompt", "the", "--max-new-tokens", "4"],
        ["forecast", run, "--at", "0.8"],
        ["plot", run],
        ["data", "validate", str(tmp_path / "corpus.jsonl")],
        ["data", "inspect", str(tmp_path / "corpus.jsonl"), "--samples", "1"],
    ]
    for words in verbs:
        out, foreign = said(*words)
        assert foreign == [] and out, words
        assert not THEIRS.search(out), words
