"""Training throughput of one GPU: this project, a bare PyTorch loop, Hugging Face Trainer and torchtitan's model.

    python benchmarks/throughput.py                                  # about half an hour on one GPU
    python benchmarks/throughput.py --budget 240                     # the most important configurations
    python benchmarks/throughput.py --models 8b --seq-lens 8192 --layers 8
    python benchmarks/throughput.py --tiny --out /tmp/bench          # does it run? toy sizes on the CPU

Every configuration runs in a process of its own: same initial weights, same packed rows, same attention, AdamW (fused),
clipping and schedule; compiled (--compile). First the bare loop, not compiled and in the same precision, makes the first
losses; a provider whose losses differ by more than FIRST (first step) or LATER (the next) is reported without a speed.

    scale                          BackwardStepper, Single and CausalLM with its automatic kernels and loss
    bare                           a hand-written loop, model and loss compiled together
    huggingface                    transformers.Trainer with torch_compile
    torchtitan_model_in_bare_loop  torchtitan's Llama in the bare loop, under autocast: its trainer is not measured

A configuration that runs out of memory is tried again with recompute=auto. Those that --budget leaves no time for are
recorded as "not run". What the columns of throughput.csv mean is in docs/benchmarks.md.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()  # imports take their share of --budget

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.child import run_child
from benchmarks.common import RESULTS, Row, this_machine, write_csv
from benchmarks.gpu_loops import PROVIDERS, TITAN, reference
from benchmarks.gpu_work import Cell, Settings, free_memory, make_work
from benchmarks.throughput_rows import OUT_OF_MEMORY, Result, report, rows_of
from scale.errors import OutOfMemory, ScaleError
from scale.hardware import detect, has_fp8, installed, peak_flops
from scale.train.step import is_out_of_memory

GATE_STEPS = 3
FIRST, LATER = {"bf16": 2e-4, "fp8": 2e-3}, 2e-2
"""Largest relative difference of the first loss, by precision, and of those after it: rounding in another order."""
LEAST = 25
"""Seconds without which a configuration is not begun: its process would not even be ready."""
CORE = [("scale", "bf16"), ("bare", "bf16")]
FP8 = [("scale", "fp8")]
PEERS = [("huggingface", "bf16"), (TITAN, "bf16")]
MORE = [("scale", "fp8 rowwise"), ("bare", "fp8")]
Outcome = dict[str, Any]
Run = Callable[[Cell, Settings, float], Outcome]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/throughput.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=["1b", "8b"], default=["1b", "8b"], help="most important first")
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[4096, 8192], metavar="N")
    parser.add_argument("--layouts", nargs="+", choices=["packed", "whole"], default=["packed", "whole"])
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--layers", type=int, default=4, help="layers of 8b (default: %(default)s, for 80 GB)")
    parser.add_argument("--micro", type=int, default=8192, help="tokens of a micro-batch (default: %(default)s)")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before the clock (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="steps on the clock (default: %(default)s)")
    parser.add_argument("--compile", choices=["off", "default", "max-autotune"], default="default")
    parser.add_argument("--attention", default="auto", help="compute.attention, for all (default: %(default)s)")
    parser.add_argument(
        "--kernels", choices=["auto", "off", "liger"], default="auto", help="compute.kernels, for scale"
    )
    parser.add_argument("--budget", type=float, default=1800, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of throughput.csv")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU, not compiled; give --out as well")
    parser.add_argument("--cell", nargs=2, metavar=("JSON", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.tiny and args.out == RESULTS and not args.cell:
        parser.error("--tiny measures nothing worth keeping: give --out FOLDER")
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    if args.tiny:
        return Settings("cpu", "off", kernels="off", micro=128, warm_up=1, steps=3)
    return Settings(
        "cuda", args.compile, args.attention, args.kernels, args.layers, args.micro, args.accumulation, args.warm_up,
        max(args.steps, GATE_STEPS),
    )  # fmt: skip


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """All configurations, the most important first: packed rows before whole ones, each model at its usual length."""
    if args.tiny:
        grid = [("tiny", 64, layout) for layout in args.layouts]
    else:
        usual = {"1b": min(args.seq_lens), "8b": max(args.seq_lens)}
        grid = [(m, n, layout) for layout in args.layouts for m in args.models for n in args.seq_lens]
        grid.sort(key=lambda at: (args.layouts.index(at[2]), at[1] != usual[at[0]]))
    first = [at for at in grid if args.tiny or (at[2] == args.layouts[0] and at[1] == usual[at[0]])]
    rest = [at for at in grid if at not in first]
    ranked = [(at, which) for which in (CORE, FP8, PEERS, MORE) for at in first]
    ranked += [(at, [*CORE, *FP8, *PEERS, *MORE]) for at in rest]
    return [Cell(name, *at, how) for at, which in ranked for name, how in which if name in args.providers]


def obstacle(cell: Cell, settings: Settings) -> str | None:
    """Why a configuration cannot be measured here at all."""
    if cell.provider == TITAN and not installed("torchtitan"):
        return "torchtitan is not installed"
    if cell.provider == TITAN and settings.device == "cpu":
        return "no backward pass of flex attention on a CPU"
    if cell.precision.startswith("fp8"):
        if not installed("torchao"):
            return "torchao is not installed"
        if settings.device == "cuda" and not has_fp8(detect("cuda")):
            return "this GPU has no FP8"
    return None


def measure(cell: Cell, settings: Settings, seconds: float = 0) -> Outcome:
    """Gate, then the clock, in this process. The outcome is JSON; `status` says why there is no speed."""
    try:
        work = make_work(cell, settings)
        expected = reference(work, GATE_STEPS)
        free_memory()
        with tempfile.TemporaryDirectory(prefix="scale-bench-") as folder:
            run = PROVIDERS[cell.provider](work, Path(folder))
    except (RuntimeError, ScaleError) as error:
        if isinstance(error, OutOfMemory) or is_out_of_memory(error) or str(error).startswith("out of memory"):
            return {"status": OUT_OF_MEMORY}
        raise
    differences = [abs(loss / right - 1) for loss, right in zip(run.losses, expected, strict=False)]
    out: Outcome = {"losses": run.losses, "expected": expected, "differences": differences, "attention": work.attention}
    allowed = [FIRST[cell.precision.split()[0]], *[LATER] * (GATE_STEPS - 1)]
    if not all(difference <= limit for difference, limit in zip(differences, allowed, strict=True)):  # also NaN
        shown = ", ".join(
            f"{loss:.6f} (expected {right:.6f})" for loss, right in zip(run.losses, expected, strict=False)
        )
        return out | {"status": f"wrong losses: {shown}"}
    hardware = detect(settings.device)
    return out | {
        "status": "ok",
        "seconds": run.steps,
        "tokens": work.groups[0].tokens,
        "peak_bytes": torch.cuda.max_memory_allocated() if settings.device == "cuda" else None,
        "parameters": work.parameters(),
        "flops_per_token": work.flops_per_token(),
        "peak_flops": float(peak_flops(hardware, "bf16").value),
    }


def in_a_process_of_its_own(cell: Cell, settings: Settings, seconds: float) -> Outcome:
    """`measure` in a fresh interpreter: no leftover memory or patched class, and a crash or a hang ends this one alone."""
    with tempfile.TemporaryDirectory(prefix="scale-bench-") as folder:
        path = Path(folder, "outcome.json")
        asked = json.dumps({"cell": asdict(cell), "settings": asdict(settings)})
        problem = run_child([sys.executable, str(Path(__file__).resolve()), "--cell", asked, str(path)], seconds)
        if problem is not None:
            return {"status": problem}
        outcome: Outcome = json.loads(path.read_text(encoding="utf-8"))
        return outcome


def measure_all(
    cells: list[Cell], settings: Settings, end: float, run: Run, keep: Callable[[list[Result]], None]
) -> None:
    """Every configuration in turn until `end` (of time.monotonic); `keep` is given all outcomes so far after each."""
    results: list[Result] = []
    waiting = list(cells)
    while waiting:
        cell = waiting.pop(0)
        left, problem = end - time.monotonic(), obstacle(cell, settings)
        if problem is None and left < LEAST:
            problem = "not run: no time left"
        outcome = {"status": problem} if problem else run(cell, settings, left)
        results.append(Result(cell, outcome))
        print(f"{cell}: {outcome['status']}", flush=True)
        keep(results)
        if outcome["status"] == OUT_OF_MEMORY and cell.recompute == "off" and cell.provider != TITAN:
            waiting.insert(0, replace(cell, recompute="auto"))


def main(arguments: list[str] | None = None, run: Run = in_a_process_of_its_own, began: float | None = None) -> int:
    args = parse(arguments)
    end = (time.monotonic() if began is None else began) + args.budget
    if args.cell:
        asked, path = json.loads(args.cell[0]), Path(args.cell[1])
        path.write_text(json.dumps(measure(Cell(**asked["cell"]), Settings(**asked["settings"]))), encoding="utf-8")
        return 0
    settings = settings_of(args)
    if settings.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing was measured")
        return 0
    machine = this_machine(settings.device)
    rows: list[Row] = []

    def keep(results: list[Result]) -> None:
        rows[:] = rows_of(results, settings)
        write_csv(args.out / "throughput.csv", rows, machine)

    measure_all(cells_of(args), settings, end, run, keep)
    report(rows, machine)
    print(f"written to {args.out / 'throughput.csv'}")
    return 0 if any(row.metric == "throughput" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(began=BEGAN))
