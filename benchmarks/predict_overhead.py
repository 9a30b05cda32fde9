"""What watching costs: full steps with the predictor observing, beside the same steps without it, and its memory.

    python benchmarks/predict_overhead.py --models tiny 100m          # CPU: about ten minutes for 100m
    python benchmarks/predict_overhead.py --models 100m 1b --every 5  # where steps are short, compute statistics less often

Both kinds of steps are made by one trainer on the same model, in turn, `--steps` at a time; ratios are taken within such a
pair. `--every`: steps between two statistics of the weights (predict.every). The world model learns as in a run. Losses of a
run that is observed are bit-identical to one that is not; tests hold that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run by path: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, Row, print_table, summarise, this_machine, write_csv
from scale.api import build_trainer
from scale.config.loader import validate
from scale.config.predict import PredictConfig
from scale.hardware import detect
from scale.predict.stepper import PredictiveStepper

QUICK_TO_START = {"compile": "default", "precision": "bf16"}
"""On a GPU `auto` would try kernels and time FP8 for minutes."""


def config_of(folder: Path, args: argparse.Namespace, preset: str) -> Any:
    """A run of the preset on the sources of Python's standard library."""
    return validate(
        {
            "version": 1,
            "kind": "pretrain",
            "name": "overhead",
            "runs_dir": str(folder),
            "model": {"preset": preset},
            "data": {
                "sources": [{"kind": "python-stdlib"}],
                "tokenizer": {"vocab_size": 4096},
                "seq_len": args.seq_len,
            },
            "batch": {"sequences": args.rows},
            "train": {"steps": 10_000},
            "compute": QUICK_TO_START if torch.cuda.is_available() else {},
            "monitor": {"progress": False, "layer_gradients": 0},
        },
        {},
        folder / "overhead.yaml",
    )


def measure(args: argparse.Namespace, preset: str) -> list[Row]:
    """Seconds per step, watched and not, and MiB kept for it."""
    with tempfile.TemporaryDirectory() as folder:
        made: list[PredictiveStepper] = []

        def around(full: Any) -> PredictiveStepper:
            made.append(PredictiveStepper(full, PredictConfig(enabled=True, mode="observe", every=args.every)))
            return made[0]

        trainer = build_trainer(config_of(Path(folder), args, preset), around=around)
        watched, source = made[0], trainer.source
        device = trainer.ranks.device

        def clock(step: Callable[[Any], Any], watchers: list[Any]) -> float:
            watched.full.watchers = watchers
            _wait(device)
            start = time.perf_counter()
            for _ in range(args.steps):
                step(source)
            _wait(device)
            return (time.perf_counter() - start) / args.steps

        plain: list[Any] = [watched.full.gradients]
        both = [*plain, watched.hook]
        clock(watched.step, both), clock(watched.full.step, plain)  # warm-up
        seconds: dict[str, list[float]] = {"plain": [], "watched": []}
        for _ in range(args.rounds):
            seconds["plain"].append(clock(watched.full.step, plain))
            seconds["watched"].append(clock(watched.step, both))
        kept = sum(watched.memory.values()) / 2**20
        config = f"{preset}, {args.rows} x {args.seq_len} tokens, every {args.every}"
        rows = summarise("predict_overhead", "step", "s", args.every, config, seconds, "plain")
        return rows + summarise("predict_overhead", "memory", "MiB", args.every, config, {"watched": [kept]}, "watched")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "100m"], help="presets (%(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="rows in a step (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a row (%(default)s)")
    parser.add_argument("--every", type=int, default=5, help="steps between two statistics (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps at a time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV (%(default)s)")
    args = parser.parse_args()
    if args.steps % args.every:
        parser.error(
            f"--steps {args.steps}: a multiple of --every {args.every} is needed, or statistics would not be shared out"
        )
    rows: list[Row] = []
    for preset in args.models:
        rows += measure(args, preset)
        write_csv(args.out / "predict_overhead.csv", rows, this_machine(detect("auto").device))
    print_table(rows, "watching: seconds per step, and memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
