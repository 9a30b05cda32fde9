"""What `scale plan` foresees beside what training takes on a GPU: peak memory of a few steps of the real trainer.

    python benchmarks/plan_memory.py --models tiny 1b

Needs a CUDA device; without one it says so and ends. Compiled code and fused kernels take less than the plan, which
follows eager PyTorch, so both are measured: compiled with what else `auto` chooses, and with compile and kernels off.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, Row, print_table, summarise, this_machine, write_csv
from scale.build import build_trainer
from scale.config import PretrainRun
from scale.hardware import detect
from scale.plan.plan import make_plan

SEQ_LEN = 2048
EAGER = {"compile": "off", "kernels": "off", "attention": "sdpa", "precision": "bf16"}
COMPILED = {"precision": "bf16", "compile": "default"}  # not max-autotune, whose trials take minutes
MODES = {"compiled": COMPILED, "eager": EAGER}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny", "1b"], help="presets")
    parser.add_argument("--rows", type=int, default=8, help="rows of 2048 tokens in a step")
    parser.add_argument("--micro", type=int, default=4, help="rows in a micro-batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of plan_memory.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to compare a plan with")
        return 0
    rows: list[Row] = []
    for model in args.models:
        for mode, compute in MODES.items():
            rows += _compare(model, mode, compute, args)
    write_csv(args.out / "plan_memory.csv", rows, this_machine("cuda"))
    print_table(rows, "peak memory of a step, planned over measured")
    return 0


def _compare(model: str, mode: str, compute: dict[str, Any], args: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), model, compute, args)
        measured = _measured(config)
        planned = make_plan(config, 1, detect("cuda")).memory.peak
    values = {"measured": [measured / 2**20], "planned": [planned / 2**20]}
    shape = f"{model}, {mode}, {args.micro} x {SEQ_LEN} tokens"
    return summarise("plan_memory", "peak memory", "MiB", args.micro, shape, values, "measured")


def _config(folder: Path, model: str, compute: dict[str, Any], args: argparse.Namespace) -> PretrainRun:
    """A run on random tokens: their values do not change what memory they take."""
    ids_NL = np.random.default_rng(0).integers(0, 32_000, (64, SEQ_LEN + 1), dtype=np.uint16)
    np.save(folder / "rows.npy", ids_NL)
    content: dict[str, Any] = {
        "version": 1,
        "kind": "pretrain",
        "name": "plan-memory",
        "runs_dir": str(folder / "runs"),
        "model": {"preset": model} | ({"overrides": {"vocab_size": 32_768}} if model == "tiny" else {}),
        "data": {
            "sources": [{"kind": "packed", "path": str(folder / "rows.npy")}],
            "seq_len": SEQ_LEN,
            "held_out": {"fraction": 0.0},
            "workers": 0,
        },
        "batch": {"sequences": args.rows, "micro": args.micro},
        "train": {"steps": args.steps},
        "compute": compute,
        "monitor": {"progress": False, "layer_gradients": 0},
        "checkpoint": {"every": 10**9},
    }
    return PretrainRun.model_validate(content)


def _measured(config: PretrainRun) -> int:
    """Bytes that torch's caching allocator had given out at most, while the trainer ran."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer = build_trainer(config)
    trainer.fit()
    peak = torch.cuda.max_memory_allocated()
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    return peak


if __name__ == "__main__":
    sys.exit(main())
