"""Predictive training against full training and against cheaper ways to train less: a table by regime.

    python benchmarks/predict_vs_full.py                                # every task (hours on a CPU; goes on where it stopped)
    python benchmarks/predict_vs_full.py --tasks linear network cnn     # some of them
    python benchmarks/predict_vs_full.py --quick --out /tmp/bench       # a minute: does it run?

Every task is trained in full, with paired seeds (same initial weights, same order of data), for a number of steps that was
fixed beforehand, where the loss still falls by 1% or more per tenth of the run. The predictive run has the same schedule;
steps it is credited with are counted without a pass. Its checking forwards are charged: a forward is a third of a step.

Controls get as many backward passes as the predictive run used (median of the seeds), with full decay at that shorter
horizon: the same learning rate; the learning rate that is best there, chosen on a seed that is not scored; and the same
with the mean of the last weights, with outer Nesterov and with EMA-Nesterov. `best control` is the lowest of these. Where
selection lets the predictive run have a shorter schedule of its own, the same controls also get all the steps: `best at all
steps` is what has to be reached with fewer.

The spread of paired differences in the first three seeds says how many would show, at 5% and with 80% power, that the loss
is not worse by more than the margin; no more than `--max-seeds` are run (of ablations and controls three where a run takes
minutes), and the table names both. `upper` is the one-sided
95% bound of the mean difference (Student's t). `active` is the share of steps that were predicted or made on
chosen documents: 0 means that the stepper chose to do nothing. Where no jump was tried there is nothing to ablate.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

if __package__ in (None, ""):  # run by path: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, summarise, this_machine, write_csv
from benchmarks.regimes.jobs import CONTROLS, Job, Kept, at
from benchmarks.regimes.start import CACHE
from benchmarks.regimes.tasks import OTHERS, SEEDS, TASKS, Outcome, Task, predictor

PILOT = 3
TUNING_SEED = 1000
"""Learning rates of controls are chosen on it; it is never scored."""
Z = 1.645 + 0.842
"""One-sided 5%, 80% power."""


def providers(task: Task, seeds: list[int], kept: Kept) -> dict[str, list[Outcome]]:
    """Outcomes of everything that is compared, by seed: ablations and controls on the first seeds alone where a run takes
    minutes."""
    full = Job(task.name, "full", 0, task.steps, task.lr)
    steps = task.shorter or task.steps
    jumping = at(full, kind="predict", steps=steps, selection=task.selection, predict=predictor(task))

    def over_seeds(job: Job, most: int = OTHERS[task.regime]) -> list[Outcome]:
        return [kept.outcome(TASKS, at(job, seed=seed)) for seed in seeds[:most]]

    found = {"full": over_seeds(full, len(seeds)), "predict": over_seeds(jumping, len(seeds))}
    tried = any((outcome.ledger or {}).get("attempts") for outcome in found["predict"])
    if tried:  # or both would be the same runs again
        name, changes = shorter_jumps(task)
        found[name] = over_seeds(at(jumping, predict=predictor(task, **changes)))
    if tried and task.predict.get("confidence") != 0:  # or the world model has no say
        found["predict, shuffled features"] = over_seeds(at(jumping, kind="shuffled"))
    if task.selection != "off":
        found["prediction alone"] = over_seeds(at(jumping, selection="off"))
        for name in ("regression", "history") if task.shorter else ():
            found[f"selection by {name} alone"] = over_seeds(at(jumping, kind="selection", selection=name, predict={}))
    passes = round(statistics.median(outcome.backward for outcome in found["predict"]))
    short = at(full, steps=passes)
    found["shorter, same lr"] = over_seeds(short)
    tuned = at(short, lr=best_lr(task, short, kept))
    found["shorter, tuned lr"] = over_seeds(tuned)
    if task.selection != "off" and not task.shorter:
        found["shorter, tuned lr, selection"] = over_seeds(at(tuned, kind="selection", selection=task.selection))
    whole = at(full, lr=best_lr(task, full, kept))
    found["full, tuned lr"] = over_seeds(whole)
    for name in CONTROLS:
        found[f"shorter, {name}"] = over_seeds(at(tuned, kind=name))
        if task.shorter:
            found[f"full, {name}"] = over_seeds(at(whole, kind=name))
    return found


def shorter_jumps(task: Task) -> tuple[str, dict[str, Any]]:
    """The ablation: weights go half as far, or updates are repeated once only, and as much is counted."""
    if not task.predict.get("extrapolation_steps"):
        return "predict, half coefficients", {"coefficients": "line", "share": 0.5}
    discount = min(1.0, task.predict["extrapolation_ratio"] * task.predict["guard"]["discount"])
    return "predict, updates repeated once", {"extrapolation_ratio": 1, "guard": {"discount": discount}}


def best_lr(task: Task, job: Job, kept: Kept) -> float:
    """Of the task's grid, on the seed for tuning."""
    return min(task.lrs, key=lambda lr: kept.outcome(TASKS, at(job, seed=TUNING_SEED, lr=lr)).loss)


def seeds_needed(full: list[Outcome], other: list[Outcome], margin: float) -> int:
    """Paired seeds that show non-inferiority by `margin` (relative), from the spread of the first three."""
    pilot = list(zip(full, other, strict=True))[:PILOT]
    spread = statistics.stdev(b.loss / a.loss - 1 for a, b in pilot)
    return max(PILOT, math.ceil((Z * spread / margin) ** 2))


def upper_bound(changes: list[float]) -> float:
    """One-sided 95% bound of the mean; nan for one value."""
    if len(changes) < 2:
        return math.nan
    error = statistics.stdev(changes) / math.sqrt(len(changes))
    return statistics.mean(changes) + float(student.ppf(0.95, len(changes) - 1)) * error


def still_falling(outcome: Outcome) -> float:
    """Fall of the loss over the last tenth of the run, relative."""
    (_, before), (_, last) = outcome.curve[-2:]
    return 1 - last / before


def changes_of(found: dict[str, list[Outcome]], name: str) -> list[float]:
    """Relative changes of the held-out loss by seed, against the full runs."""
    return [b.loss / a.loss - 1 for a, b in zip(found["full"], found[name], strict=False)]


def verdict(task: Task, found: dict[str, list[Outcome]]) -> dict[str, Any]:
    """The row of a task: medians over paired seeds."""
    full, jumping = found["full"], found["predict"]

    def change(name: str) -> list[float]:
        return changes_of(found, name)

    def saved(of: str) -> float:
        return statistics.median(1 - getattr(b, of) / getattr(a, of) for a, b in zip(full, jumping, strict=True))

    def best_of(kind: str) -> str:
        return min((n for n in found if n.startswith(kind)), key=lambda name: statistics.median(change(name)))

    best, best_full = best_of("shorter"), best_of("full")
    changes = change("predict")
    return {
        "task": task.name,
        "seeds": len(full),
        "needed": seeds_needed(full, jumping, task.margin) if len(full) >= PILOT else math.nan,
        "falling": statistics.median(still_falling(one) for one in full),
        "saved": saved("backward"),
        "flops": saved("flops"),
        "seconds": saved("seconds"),
        "active": statistics.median(one.active for one in jumping),
        "change": statistics.median(changes),
        "upper": upper_bound(changes),
        "best": best,
        "control": statistics.median(change(best)),
        "best_full": best_full,
        "control_full": statistics.median(change(best_full)),
        "goal": task.goal,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="predictive training against full training")
    for name in (
        "task",
        "seeds",
        "last tenth",
        "backward",
        "FLOPs",
        "time",
        "active",
        "loss (upper 95%)",
        "best control",
        "best at all steps",
    ):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(
            f"{row['task']} (goal -{row['goal']:.0%})",
            f"{row['seeds']} of {row['needed']}",
            f"{-row['falling']:+.1%}",
            f"{-row['saved']:+.1%}",
            f"{-row['flops']:+.1%}",
            f"{-row['seconds']:+.1%}",
            f"{row['active']:.0%}",
            f"{row['change']:+.2%} ({row['upper']:+.2%})",
            f"{row['best']}: {row['control']:+.2%}",
            f"{row['best_full']}: {row['control_full']:+.2%}",
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=" | ".join(TASKS)
    )
    parser.add_argument("--max-seeds", type=int, help=f"most paired seeds of a task, at least 3 (by regime: {SEEDS})")
    parser.add_argument("--quick", action="store_true", help="one seed of one task; needs --out")
    parser.add_argument(
        "--kept", type=Path, default=CACHE / "predict_vs_full.jsonl", help="finished runs (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV (%(default)s)")
    args = parser.parse_args()
    if args.quick and args.out == RESULTS:
        parser.error("--quick: give it an --out folder, or its single seed would replace the table")
    console = Console(width=150)
    if args.quick:
        args.tasks, args.kept = ["network"], args.out / "predict_vs_full.jsonl"
    kept = Kept(args.kept, console.print)
    rows, csv = [], []
    for task in (TASKS[name] for name in args.tasks):
        found = providers(task, list(range(1 if args.quick else PILOT)), kept)
        if not args.quick:
            needed = seeds_needed(found["full"], found["predict"], task.margin)
            found = providers(task, list(range(min(needed, max(args.max_seeds or SEEDS[task.regime], PILOT)))), kept)
        rows.append(verdict(task, found))
        for metric, unit in (("loss", "nats"), ("backward", "steps"), ("flops", "steps"), ("seconds", "s")):
            measured = {name: [getattr(one, metric) for one in outcomes] for name, outcomes in found.items()}
            csv += summarise("predict_vs_full", metric, unit, task.steps, task.name, measured, "full")
        bounds = {name: [upper_bound(changes_of(found, name))] for name in found if name != "full"}
        csv += summarise("predict_vs_full", "upper", "relative", task.steps, task.name, bounds, "predict")
        show(rows[-1:], console)
    console.print(f"runs kept from code at: {', '.join(sorted(kept.commits))}")
    write_csv(args.out / "predict_vs_full.csv", csv, this_machine("cpu"))
    show(rows, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
