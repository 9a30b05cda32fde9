"""A tiny corpus, a tiny model and a run config over them, used all over the tests."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

torch.set_num_threads(1)  # tests run two at a time on small machines

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards quietly mix potions under old oak trees"
WORDS = TEXT.split()


def write_corpus(path: Path, documents: int = 200, seed: int = 0) -> Path:
    """JSONL of random sentences, 3 to 60 words each."""
    rng = random.Random(seed)
    texts = (" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i, text in enumerate(texts)))
    return path


def tiny_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Content of a config that trains a few thousand parameters on the corpus; `changes` replace top-level keys."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    return {
        "version": 1,
        "kind": "pretrain",
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "model": {
            "preset": "tiny",
            "overrides": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
            },
        },
        "data": {
            "sources": [{"kind": "jsonl", "path": str(corpus)}],
            "tokenizer": {"vocab_size": 320},
            "seq_len": 64,
            "held_out": {"fraction": 0.1},
            "cache": str(folder / "cache"),
            "workers": 0,
        },
        "batch": {"sequences": 8},
        "train": {"steps": 20},
        "optim": {"lr": 3e-3},
        "eval": {"every": 10, "tokens": 1024},
        "checkpoint": {"every": 10},
        "monitor": {"progress": False, "layer_gradients": 5},
    } | changes


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny run config and returns its path."""

    def make(**changes: Any) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tiny_run(tmp_path, **changes)))
        return path

    return make


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without the fields that depend on the clock."""
    from scale.monitor.records import TIME_FIELDS

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in rows]
