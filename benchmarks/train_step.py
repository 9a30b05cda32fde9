"""Tokens per second of whole optimizer steps: this project's loop, Hugging Face Trainer and a bare PyTorch loop.

    python benchmarks/train_step.py                                   # the demo model on this machine
    python benchmarks/train_step.py --tokens 2048 8192 --rounds 9     # two batch sizes
    python benchmarks/train_step.py --quick --out /tmp/bench          # half a minute: does it run?

All providers train the same architecture from the same weights with the same AdamW, schedule, clipping and precision
on the same packed batches, without torch.compile. What the clock sees runs from the start of one step to the start of
a later one, so everything a loop does between steps is inside; set-up, warm-up steps, evaluation and checkpoints are
outside. The device is synchronised at both ends of that stretch only.

    bare          forward, loss, backward, clip, AdamW, schedule, zero_grad; batches from a list; reads no loss
    bare_again    the same once more: how far its ratio is from 1 is the noise of this run
    huggingface   transformers.Trainer with logging, evaluation and saving off; batches from a list by its DataLoader
    scale         Trainer.fit with metrics.jsonl, run_state.json, spike filter and layer gradients; batches from a list
    scale_stream  the same, with batches packed on the fly by the run's own source, as `scale train` does

First all must give the same losses (relative 1e-5 in fp32, on a GPU 1e-4) on the same batches; otherwise no speed is
reported. Each round runs every provider once, from the start, in turning order; ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console

if __package__ in (None, ""):  # run by path: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, Row, bar_plot, line_plot, print_table, summarise, this_machine, write_csv
from benchmarks.loops import PROVIDERS
from benchmarks.work import Run, Work, prepare_work, with_steps
from scale.api import load_config
from scale.errors import ScaleError

GATE_STEPS, ROUND_STEPS = 8, 4
"""Steps compared in fp32 before anything is timed, and in every round. After 8 even a wrong weight decay shows."""
FP32, BF16 = {"cpu": 1e-5, "cuda": 1e-4}, 2e-2
"""Largest relative difference of losses: rounding of another order of sums in fp32, which AdamW's first steps amplify; of
bf16 activations."""
Keep = Callable[[Work, dict[str, list[float]]], None]
ALWAYS = (
    "optim.kind=adamw",
    "data.held_out.fraction=0",
    "eval.every=1000000",
    "checkpoint.every=1000000",
    "monitor.progress=false",
    "compute.compile=off",
    "compute.recompute=off",
)
"""What makes the loops comparable; --set cannot change it."""
SPOILABLE = [name for name in PROVIDERS if name != "scale_stream"]
"""scale_stream draws its own batches."""
QUICK = (
    "model.overrides={hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 1, vocab_size: 512}",
    "data.tokenizer.vocab_size=512",
    "data.seq_len=64",
    "batch.micro=4",
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/train_step.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="configs/demo.yaml", help="run config (default: %(default)s)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the config, as in `scale train`"
    )
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens per step to sweep (default: the config's)")
    parser.add_argument("--steps", type=int, default=10, help="steps on the clock in each round (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the clock starts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS), help="besides bare")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of train_step.csv and .png")
    parser.add_argument("--quick", action="store_true", help="a very small model and few steps; give --out as well")
    parser.add_argument("--spoil", choices=SPOILABLE, help="give one provider other batches: the gate must fail")
    args = parser.parse_args(arguments)
    args.providers = ["bare", *(name for name in args.providers if name != "bare")]
    if args.quick:
        args.steps, args.rounds, args.tokens = 3, 2, args.tokens or [512]
        if args.out == RESULTS:
            parser.error("--quick measures nothing worth keeping: give --out FOLDER")
    return args


def differences(runs: dict[str, Run], steps: int) -> dict[str, float]:
    """Largest relative difference of each provider's first losses from the bare loop's; NaN if a loss is NaN."""
    right = np.array(runs["bare"].losses[:steps])
    return {name: float(np.max(np.abs(np.array(run.losses[:steps]) / right - 1))) for name, run in runs.items()}


def check_same_losses(runs: dict[str, Run], tolerance: float, steps: int = GATE_STEPS) -> dict[str, float]:
    """The differences, if all are within `tolerance`. Raises ScaleError naming the provider that trains otherwise."""
    found = differences(runs, steps)
    for name, difference in found.items():
        if not difference <= tolerance:  # also NaN
            ours = ", ".join(f"{loss:.6f}" for loss in runs[name].losses[:steps])
            right = ", ".join(f"{loss:.6f}" for loss in runs["bare"].losses[:steps])
            raise ScaleError(
                f"{name}: its losses {ours} differ from the bare loop's {right} by {difference:.2g} "
                f"(allowed: {tolerance:g}): it trains something else, so its speed means nothing"
            )
    return found


def run_all(work: Work, names: list[str], spoil: str | None, first: int = 0) -> dict[str, Run]:
    """Every provider once, beginning with the one at `first`."""
    order = deque(names)
    order.rotate(-first)
    runs = {}
    for name in order:
        gc.collect()
        with tempfile.TemporaryDirectory(prefix="scale-bench-") as folder:
            runs[name] = PROVIDERS[name](work.spoiled() if name == spoil else work, Path(folder))
    return {name: runs[name] for name in names}


def measure(args: argparse.Namespace, tokens: int | None, say: Console, keep: Keep) -> None:
    """After the gate, round by round: `keep` is given the tokens per second of every provider in all rounds so far."""
    changes = [*(QUICK if args.quick else ()), *args.set, *ALWAYS, f"compute.device={args.device}"]
    changes += [f"batch.tokens={tokens}"] if tokens else []
    config = load_config(args.config, changes)
    gate = prepare_work(with_steps(config, GATE_STEPS, precision="fp32"), warm_up=0)
    exact = FP32[gate.device.type]
    found = check_same_losses(run_all(gate, args.providers, args.spoil), exact)
    say.print("same losses, largest relative difference:", ", ".join(f"{k} {v:.1e}" for k, v in found.items()))
    work = prepare_work(with_steps(config, args.warm_up + args.steps + 1), args.warm_up)
    measured: dict[str, list[float]] = {name: [] for name in args.providers}
    for i in range(args.rounds):
        runs = run_all(work, args.providers, args.spoil, first=i)
        check_same_losses(runs, exact if work.precision == "fp32" else BF16, min(ROUND_STEPS, len(work.groups)))
        for name, run in runs.items():
            measured[name].append(work.timed_tokens / run.seconds)
        say.print(f"round {i + 1}, tokens/s:", ", ".join(f"{name} {v[-1]:.0f}" for name, v in measured.items()))
        keep(work, measured)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    say = Console(stderr=True, soft_wrap=True)
    machine = this_machine(args.device)
    rows_at: dict[int | None, list[Row]] = {}

    def keep(tokens: int | None, work: Work, measured: dict[str, list[float]]) -> None:
        size = work.config.tokens_per_step
        named = f"{Path(args.config).stem} {work.precision}{' quick' if args.quick else ''}"
        rows_at[tokens] = summarise("train_step", "throughput", "tokens/s", size, named, measured, "bare")
        write_csv(args.out / "train_step.csv", chain(*rows_at.values()), machine)

    try:
        for tokens in args.tokens or [None]:
            measure(args, tokens, say, partial(keep, tokens))
    except ScaleError as error:
        say.print(str(error), markup=False, highlight=False)
        return error.exit_code
    rows = [*chain(*rows_at.values())]
    title = f"Optimizer steps on {machine.device} ({machine.cpus} cores)"
    print_table(rows, f"{title}, tokens/s by tokens per step")
    plot = args.out / "train_step.png"
    if len({row.x for row in rows}) == 1:
        bar_plot(plot, rows, title)
    else:
        line_plot(plot, rows, title, "tokens per step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
