"""Does FP8 learn what BF16 learns, and is it faster? The same config twice, from the same weights on the same data.

    python benchmarks/fp8_check.py --config configs/pretrain/500m.yaml --steps 200    # on a GPU with FP8
    python benchmarks/fp8_check.py --steps 30                                         # the demo model, emulated
    python benchmarks/fp8_check.py --quick --out /tmp/bench                           # does it run?

Losses: N steps of `scale train` in each precision, with the run's own source, optimizer and schedule; a row for every
step, x is the step, and the ratio is that step's loss over bf16's. Speed, on a GPU with FP8 only: forward and backward of
each matrix of the model, compiled; x is the number of matrices of that shape, `config` names the shape. Without such a GPU
FP8's rounding is emulated and no speed is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):  # run by path: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, Row, summarise, this_machine, write_csv
from scale.api import PretrainRun, build_trainer, load_config
from scale.errors import ScaleError
from scale.hardware import detect, has_fp8
from scale.models.fp8 import matrix_shapes
from scale.models.fp8_speed import Timing, measure, speedup

ALWAYS = (
    "data.held_out.fraction=0",
    "eval.every=1000000",
    "checkpoint.every=1000000",
    "monitor.progress=false",
    "compute.recompute=off",
)
"""What keeps the two runs apart in precision alone; --set cannot change it."""
QUICK = (
    "model.overrides={hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 1, vocab_size: 512}",
    "data.tokenizer.vocab_size=512",
    "data.seq_len=64",
    "batch.tokens=512",
    "batch.micro=4",
    "compute.fp8.smallest=32",
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/fp8_check.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="configs/demo.yaml", help="run config (default: %(default)s)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the config, as in `scale train`"
    )
    parser.add_argument("--steps", type=int, default=30, help="steps in each precision (default: %(default)s)")
    parser.add_argument("--smallest", type=int, default=64, help="compute.fp8.smallest (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of fp8_check.csv")
    parser.add_argument("--quick", action="store_true", help="a model of a few thousand parameters, 10 steps")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    steps = 10 if args.quick else args.steps
    try:
        emulate = not has_fp8(detect())
        rows, (shapes, tokens, fp8) = compare(args, steps, emulate)
    except ScaleError as error:
        print(f"fp8_check: error: {error}", file=sys.stderr)
        return error.exit_code
    path, machine = args.out / "fp8_check.csv", this_machine()
    write_csv(path, rows, machine)
    timings: list[Timing] = []
    for shape, count in {} if emulate else shapes.items():
        timings += measure({shape: count}, tokens, fp8)
        write_csv(path, [*rows, *speed_rows(timings)], machine)
    report(rows, timings, emulate)
    print(f"written to {path}")
    return 0


def compare(args: argparse.Namespace, steps: int, emulate: bool) -> tuple[list[Row], tuple]:
    """Rows of both runs' losses, and what `measure` is asked about."""
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("bf16", "fp8"):
            config = read(args, steps, Path(folder), precision, emulate)
            trainer = build_trainer(config)
            if precision == "bf16":
                asked = matrix_shapes(trainer.model, config.compute.fp8), 8192, config.compute.fp8
            if (outcome := trainer.fit()) != "completed":
                raise ScaleError(f"the run in {precision} was {outcome}")
            losses[precision] = read_losses(trainer.folder.path)
    name = f"{Path(args.config).stem}, quick" if args.quick else Path(args.config).stem
    how = "emulated" if emulate else "in hardware"
    rows = []
    for step, pair in enumerate(zip(losses["bf16"], losses["fp8"], strict=True), start=1):
        measured = {key: [value] for key, value in zip(losses, pair, strict=True)}
        rows += summarise("fp8_check", "loss", "nats/token", step, f"{name}, {how}", measured, "bf16")
    return rows, asked


def read(args: argparse.Namespace, steps: int, folder: Path, precision: str, emulate: bool) -> PretrainRun:
    changes = [
        f"compute.fp8.smallest={args.smallest}",
        *(QUICK if args.quick else ()),
        *args.set,
        *ALWAYS,
        f"train={{steps: {steps}}}",
        f"name={precision}",
        f"runs_dir={folder}",
        f"compute.precision={precision}",
        f"compute.fp8.emulate={str(emulate).lower()}",
    ]
    return load_config(Path(args.config), changes)


def read_losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if row["step"] > 0]


def speed_rows(timings: list[Timing]) -> list[Row]:
    rows = []
    for timing in timings:
        shape = f"{timing.shape[0]} x {timing.shape[1]}"
        measured = {"bf16": [timing.bf16], "fp8": [timing.fp8]}
        rows += summarise("fp8_check", "matrix", "s", timing.count, shape, measured, "bf16")
    return rows


def report(rows: list[Row], timings: list[Timing], emulate: bool) -> None:
    losses = {name: [r.median for r in rows if r.metric == "loss" and r.provider == name] for name in ("bf16", "fp8")}
    print(f"{'step':>6} {'bf16':>9} {'fp8':>9} {'difference':>11}")
    for step, (bf16, fp8) in enumerate(zip(losses["bf16"], losses["fp8"], strict=True), start=1):
        print(f"{step:>6} {bf16:>9.4f} {fp8:>9.4f} {fp8 - bf16:>+11.4f}")
    print(f"final loss: fp8 - bf16 = {losses['fp8'][-1] - losses['bf16'][-1]:+.4f}")
    if emulate:
        print("no GPU with FP8: emulated, no speed")
    for t in timings:
        print(
            f"{t.count} x ({t.shape[0]} x {t.shape[1]}): bf16 {t.bf16 * 1e6:.0f} us, fp8 {t.fp8 * 1e6:.0f} us, {t.speedup:.2f}x"
        )
    if timings:
        print(f"all matrices: fp8 is {speedup(timings):.2f}x as fast")


if __name__ == "__main__":
    sys.exit(main())
