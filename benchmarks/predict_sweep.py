"""Sixty predictors on one real task: horizon x correction interval x confidence, every jump forced that the guard allows.

    python benchmarks/predict_sweep.py            # about ten minutes on a CPU core; goes on where it stopped
    python benchmarks/predict_sweep.py --quick    # two of them: does it run?

The task is the CNN on scikit-learn's digits of predict_vs_full.py. First a divergence is planted (a batch whose inputs are
10,000 times too large): the counter of divergences must move, or nothing is measured.

    drift        mean over jumps of |steps saved - length| / length, steps saved as the acceptance test measured them
    uncorrected  the interval is longer than the horizon: one check at the end of a jump, none within

The optimum is the configuration that saves most backward passes among those that end within 1% of the full run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

if __package__ in (None, ""):  # run by path: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, summarise, this_machine, write_csv
from benchmarks.regimes.jobs import Job, Kept
from benchmarks.regimes.start import CACHE, Settings
from benchmarks.regimes.tasks import TASKS, Outcome, predictive, predictor, run
from scale.errors import ScaleError

TASK = TASKS["cnn"]
HORIZONS, INTERVALS, CONFIDENCES = (5, 15, 30, 50, 75), (5, 15, 1000), (0.0, 0.2, 0.4, 0.6)
WORLD = {"members": 3, "hidden": 16, "train_every": 2}


def config(horizon: int, interval: int, confidence: float) -> dict[str, Any]:
    """Of one point of the sweep."""
    return predictor(
        TASK,
        mode="always",
        warmup=60,
        min_full=10,
        horizons=[horizon],
        directions=["optimizer"],
        coefficients="world",
        confidence=confidence,
        world=WORLD,
        guard={"correction_interval": interval, "growth": 1.0, "settle_steps": 3, "discount": 1.0},
    )


def counts_a_planted_divergence() -> bool:
    """Whether the counter moves for a disaster, and stays where there is none."""
    watching = predictor(TASK, mode="observe", sigma=6.0)
    calm, planted = (run(TASK, Settings(0, 200, TASK.lr, disaster=at), predictive(watching)) for at in (None, 150))
    assert calm.ledger is not None and planted.ledger is not None
    return bool(calm.ledger["divergences"] == 0 and planted.ledger["divergences"] > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two configurations, nothing is kept")
    parser.add_argument("--kept", type=Path, default=CACHE / "predict_sweep.jsonl", help="finished runs (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV (%(default)s)")
    args = parser.parse_args()
    console = Console(width=150)
    torch.set_num_threads(1)
    if not counts_a_planted_divergence():
        raise ScaleError(
            "a planted divergence did not move the counter (or it moves without one): nothing was measured"
        )
    points = list(itertools.product(HORIZONS, INTERVALS, CONFIDENCES))
    if args.quick:
        points, args.kept = points[:2], args.out / "predict_sweep.jsonl"
    kept = Kept(args.kept, console.print)
    full = kept.outcome(TASKS, Job(TASK.name, "full", 0, TASK.steps, TASK.lr))
    found = {
        point: kept.outcome(TASKS, Job(TASK.name, "predict", 0, TASK.steps, TASK.lr, predict=config(*point)))
        for point in points
    }
    report(full, found, console)
    measured = {f"horizon {h}, interval {i}, confidence {c}": [one.loss] for (h, i, c), one in found.items()}
    rows = summarise("predict_sweep", "loss", "nats", TASK.steps, TASK.name, {"full": [full.loss]} | measured, "full")
    measured = {name: [one.backward] for name, one in zip(measured, found.values(), strict=True)}
    rows += summarise(
        "predict_sweep", "backward", "steps", TASK.steps, TASK.name, {"full": [full.backward]} | measured, "full"
    )
    write_csv(args.out / "predict_sweep.csv", rows, this_machine("cpu"))
    return 0


def report(full: Outcome, found: Mapping[tuple[int, int, float], Outcome], console: Console) -> None:
    """Divergences, drift with and without micro-corrections, the optimum."""
    ledgers = [one.ledger or {} for one in found.values()]
    console.print(
        f"configurations: {len(found)}; signs of divergence: {sum(x['divergences'] for x in ledgers)}; ", end=""
    )
    console.print(
        f"runs that ended above twice the full loss: {sum(one.loss > 2 * full.loss for one in found.values())}"
    )
    for name, within in (("with micro-corrections", True), ("one check per jump", False)):
        drifts = [one.drift for (h, i, _), one in found.items() if (i < h) == within and one.drift is not None]
        if drifts:
            console.print(f"drift {name}: {statistics.mean(drifts):.4f} (median {statistics.median(drifts):.4f})")
    good = {point: one for point, one in found.items() if one.loss <= 1.01 * full.loss}
    if not good:
        console.print("optimum: none ends within 1% of the full run")
        return
    point = min(good, key=lambda p: good[p].backward)
    console.print(
        f"optimum: horizon {point[0]}, interval {point[1]}, confidence {point[2]}: {good[point].backward} backward passes "
        f"instead of {full.backward}, loss {good[point].loss:.4g} instead of {full.loss:.4g}"
    )


if __name__ == "__main__":
    sys.exit(main())
