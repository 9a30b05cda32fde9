"""Microseconds per step of an RSSM ensemble's free rollout, by paths, hidden size and horizon.

    python benchmarks/rssm_kernel.py                                          # 9 shapes; on a CPU with 1 thread and all
    python benchmarks/rssm_kernel.py --hidden 32 --paths 1 --threads 1 2 --plot
    python benchmarks/rssm_kernel.py --hidden 16 --paths 1 --horizon 3 --rounds 2 --out /tmp/out.csv    # does it run?

Five members, latent 32, 7 actions, 15 outputs, fp32, heads included. A measurement is one whole rollout over its steps: CPU
time with one thread, so that other programs do not count, the wall clock with more, on a GPU its events; every round runs
every provider once and ratios are taken within rounds.

    reference       the plain torch loop; the baseline
    scale           scale_kernels.rssm.rollout: torch on a CPU, the Triton kernel on a GPU
    compiled        torch.compile of a step in a Python loop ("reduce-overhead" on a GPU)
    scale_bf16      GPU: the kernel with bf16 weights
    graph_grucell   GPU: torch.gru_cell member by member, the whole horizon in one CUDA graph
    graph_batched   GPU: batched products, the whole horizon in one CUDA graph
    cudnn_gru       GPU: nn.GRU, all inputs known beforehand: an easier task, without prior, sampling and heads
    cudnn_lstm      GPU: nn.LSTM, the same

First every provider must give the float64 reference's numbers at every shape; otherwise no speed is reported.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

if __package__ in (None, ""):  # run by path: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scale_kernels.rssm.reference import rollout_reference

from benchmarks.common import (
    RESULTS,
    Machine,
    Row,
    line_plot,
    positive,
    print_table,
    summarise,
    this_machine,
    write_csv,
)
from benchmarks.rssm_providers import KNOWN_INPUTS, ON_CPU, ON_GPU, Ready, known_inputs
from benchmarks.rssm_work import Case, Given, converted, differences, make
from scale.errors import ScaleError

MEMBERS, LATENT, ACTIONS = 5, 32, 7
FP32, BF16 = 1e-4, 5e-2
"""Largest absolute difference of outputs and states, which are of order 1."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/rssm_kernel.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hidden", nargs="+", type=positive, default=[32, 64, 128])
    parser.add_argument("--paths", nargs="+", type=positive, default=[1, 16, 64], help="paths per member")
    parser.add_argument("--horizon", nargs="+", type=positive, default=[75])
    parser.add_argument("--threads", nargs="+", type=positive, help="CPU threads (default: 1, and all)")
    parser.add_argument(
        "--rounds", type=positive, default=30, help="measurements of each provider (default: %(default)s)"
    )
    parser.add_argument("--providers", nargs="+", choices=[*ON_GPU, *KNOWN_INPUTS], help="besides reference")
    parser.add_argument("--out", type=Path, default=RESULTS / "rssm_kernel.csv", metavar="CSV")
    parser.add_argument("--plot", action="store_true", help="also a PNG beside the CSV")
    args = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    offered = [*ON_GPU, *KNOWN_INPUTS] if on_gpu else [*ON_CPU]
    if lacking := [name for name in args.providers or () if name not in offered]:
        parser.error(f"--providers {' '.join(lacking)}: needs a GPU")
    chosen = [name for name in offered if name == "reference" or name in (args.providers or offered)]
    args.providers = chosen
    args.threads = [1] if on_gpu else args.threads or sorted({1, torch.get_num_threads()})
    return args


def prepare(case: Case, names: list[str]) -> dict[str, Ready]:
    """All providers of a case. Raises ScaleError if one gives other numbers."""
    given = make(case, MEMBERS)
    right = rollout_reference(*given)
    single = converted(given, torch.float32)
    if torch.cuda.is_available():
        single = converted(single, "cuda")
    ready: dict[str, Ready] = {}
    inputs_TEPZ = latents(given).to(single[1]) if set(names) & KNOWN_INPUTS.keys() else None
    for name in names:
        if name in KNOWN_INPUTS:
            assert inputs_TEPZ is not None
            ready[name], slow = known_inputs(single, inputs_TEPZ, KNOWN_INPUTS[name])
            agree(name, case, differences(ready[name](), slow()), FP32)
            continue
        ready[name] = ON_GPU[name](single)
        target, allowed = (rounded(given), BF16) if name == "scale_bf16" else (right, FP32)
        agree(name, case, differences(ready[name](), target), allowed)
    return ready


def agree(name: str, case: Case, errors: list[float], allowed: float) -> None:
    if not max(errors) <= allowed or any(error != error for error in errors):
        found = ", ".join(f"{error:.2g}" for error in errors)
        raise ScaleError(f"{name} at {case}: differs from the float64 reference by {found} (allowed: {allowed:g})")


def rounded(given: Given) -> tuple[torch.Tensor, ...]:
    """The reference with bf16 weights."""
    single = converted(given, torch.float32)
    return rollout_reference(single[0].to(torch.bfloat16), *single[1:])


def latents(given: Given) -> torch.Tensor:
    """The latent of every step, (T, E, P, Z)."""
    weights, h, z, actions, eps = given
    steps = []
    for t in range(len(eps)):
        _, h, z = rollout_reference(weights, h, z, actions[t : t + 1], eps[t : t + 1])
        steps.append(z)
    return torch.stack(steps)


def measure(ready: dict[str, Ready], steps: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds per step of every provider in every round, after one round that does not count."""
    measured: dict[str, list[float]] = {name: [] for name in ready}
    for i in range(rounds + 1):
        for name, work in ready.items():
            seconds = clocked(work)
            if i:
                measured[name].append(seconds / steps * 1e6)
    return measured


def clocked(work: Ready) -> float:
    if not torch.cuda.is_available():
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        work()
        return clock() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.backends.cudnn.allow_tf32 = False  # the gate is for fp32
    if not torch.cuda.is_available():
        print("no GPU: reference and compiled only, and the op's CPU path (scale)")
    cases = [
        Case(hidden, LATENT, ACTIONS, paths, steps)
        for hidden in args.hidden
        for steps in args.horizon
        for paths in args.paths
    ]
    rows: list[Row] = []
    try:
        prepared = [prepare(case, args.providers) for case in cases]
    except ScaleError as error:
        print(f"rssm_kernel: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{', '.join(args.providers)}: the float64 reference's numbers at {len(cases)} shapes")
    machine = this_machine()
    for threads in args.threads:
        torch.set_num_threads(threads)
        for case, ready in zip(cases, prepared, strict=True):
            measured = measure(ready, case.steps, args.rounds)
            config = f"hidden {case.hidden}; horizon {case.steps}; members {MEMBERS}; threads {threads}"
            rows += summarise("rssm_kernel", "step", "us/step", case.paths, config, measured, "reference")
            write_csv(args.out, rows, machine)
    report(args, rows, machine)
    return 0


def report(args: argparse.Namespace, rows: list[Row], machine: Machine) -> None:
    for metric, config in dict.fromkeys((row.metric, row.config) for row in rows):
        shown = [row for row in rows if (row.metric, row.config) == (metric, config)]
        print_table(shown, f"us/step by paths; {config}; {machine.device}")
    if args.plot:
        shown = [row for row in rows if row.metric == "step" and f"threads {args.threads[0]}" in row.config]
        named = [replace(row, provider=f"{row.provider}, {row.config.split(';')[0]}") for row in shown]
        line_plot(args.out.with_suffix(".png"), named, f"RSSM rollout on {machine.device}", "paths per member")
    print(f"written to {args.out}")


if __name__ == "__main__":
    sys.exit(main())
