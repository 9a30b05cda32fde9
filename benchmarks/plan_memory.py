"""What `scale plan` foresees beside what training takes on a GPU: peak memory of a few steps of the real trainer.

    python benchmarks/plan_memory.py --models tiny 1b
    python benchmarks/plan_memory.py --quick --out /tmp/bench       # does it run? A toy on the CPU

Needs a CUDA device; without one it says so and ends. Compiled code and fused kernels take less than the plan, which
follows eager PyTorch, so both are measured: compiled with what else `auto` chooses, and with compile and kernels off.
Each is planned and then measured in a process of its own: fused kernels, once in place, cannot be traced and would stay.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.child import run_child
from benchmarks.common import RESULTS, Row, print_table, summarise, this_machine, write_csv
from scale.build import build_trainer
from scale.config import PretrainRun
from scale.hardware import Hardware, detect
from scale.plan.plan import make_plan

EAGER = {"compile": "off", "kernels": "off", "attention": "sdpa", "precision": "bf16"}
COMPILED = {"precision": "bf16", "compile": "default"}  # not max-autotune, whose trials take minutes
MODES = {"compiled": COMPILED, "eager": EAGER}
QUICK = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/plan_memory.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=["tiny", "1b"], help="presets")
    parser.add_argument("--rows", type=int, default=8, help="rows in a step (default: %(default)s)")
    parser.add_argument("--micro", type=int, default=4, help="rows in a micro-batch (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of the trainer (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one process (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of plan_memory.csv")
    parser.add_argument("--quick", action="store_true", help="a toy on the CPU, eager; give --out as well")
    parser.add_argument("--cell", nargs=3, metavar=("MODEL", "MODE", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.quick:
        args.models, args.seq_len = ["tiny"], 64
        if args.out == RESULTS and not args.cell:
            parser.error("--quick measures nothing worth keeping: give --out FOLDER")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.cell:
        model, mode, path = args.cell
        Path(path).write_text(json.dumps(compare(model, mode, args)), encoding="utf-8")
        return 0
    if not args.quick and not torch.cuda.is_available():
        print("no GPU: nothing to compare a plan with")
        return 0
    rows: list[Row] = []
    failed = 0
    given = sys.argv[1:] if arguments is None else arguments
    for model in args.models:
        for mode in ["eager"] if args.quick else MODES:
            values = in_a_process_of_its_own(given, model, mode, args.limit)
            if isinstance(values, str):
                print(f"{model}, {mode}: {values}", flush=True)
                failed = 1
                continue
            shape = f"{model}, {mode}, {args.micro} x {args.seq_len} tokens"
            rows += summarise("plan_memory", "peak memory", "MiB", args.micro, shape, values, "measured")
            write_csv(args.out / "plan_memory.csv", rows, this_machine("cpu" if args.quick else "cuda"))
    if rows:
        print_table(rows, "peak memory of a step, planned over measured")
    return failed


def in_a_process_of_its_own(given: list[str], model: str, mode: str, seconds: float) -> dict[str, list[float]] | str:
    """MiB, measured and planned, or why there are none."""
    with tempfile.TemporaryDirectory(prefix="scale-bench-") as folder:
        path = Path(folder, "values.json")
        command = [sys.executable, str(Path(__file__).resolve()), *given, "--cell", model, mode, str(path)]
        problem = run_child(command, seconds)
        return problem if problem is not None else json.loads(path.read_text(encoding="utf-8"))


def compare(model: str, mode: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """MiB of this process: planned first, then measured."""
    with tempfile.TemporaryDirectory(prefix="scale-bench-") as folder:
        config = config_of(Path(folder), model, MODES[mode], args)
        card = Hardware.of("h100") if args.quick else detect("cuda")
        planned = make_plan(config, 1, card).memory.peak
        return {"measured": [measured(config) / 2**20], "planned": [planned / 2**20]}


def config_of(folder: Path, model: str, compute: dict[str, Any], args: argparse.Namespace) -> PretrainRun:
    """A run on random tokens: their values do not change what memory they take."""
    ids_NL = np.random.default_rng(0).integers(0, 32_000, (64, args.seq_len + 1), dtype=np.uint16)
    np.save(folder / "rows.npy", ids_NL)
    overrides = {"vocab_size": 32_768} if model == "tiny" else {}
    content: dict[str, Any] = {
        "version": 1,
        "kind": "pretrain",
        "name": "plan-memory",
        "runs_dir": str(folder / "runs"),
        "model": {"preset": model, "overrides": overrides | (QUICK if args.quick else {})},
        "data": {
            "sources": [{"kind": "packed", "path": str(folder / "rows.npy")}],
            "seq_len": args.seq_len,
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


def measured(config: PretrainRun) -> int:
    """Bytes that torch's caching allocator had given out at most, while the trainer ran; on a CPU, of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = build_trainer(config)
    trainer.fit()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
