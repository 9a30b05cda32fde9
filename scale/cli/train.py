"""`scale train`, `scale doctor`, `scale plot`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from scale.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED, UsageError
from scale.streams import guarded_output


def add_commands(verbs: Any) -> None:
    """Add the verbs to a parser."""
    train = verbs.add_parser(
        "train",
        help="train from a YAML config; the same command again continues",
        description="Train as a YAML config says. The run lives in runs/NAME; the same command again continues it.",
        epilog="example:\n  scale train configs/demo.yaml train.steps=50 name=short",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", type=Path, help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace those of the file")
    train.add_argument("--new", action="store_true", help="start a new run named NAME_YYYYmmdd_HHMMSS")
    train.add_argument(
        "--allow-change",
        default="",
        metavar="KEYS",
        help="comma-separated config keys that may differ from the started run",
    )
    train.add_argument(
        "--split",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches N times smaller than configured (launchers do this after running out of memory)",
    )
    train.add_argument("--dry-run", action="store_true", help="print derived numbers and choices, train nothing")
    train.set_defaults(run=_train)

    doctor = verbs.add_parser(
        "doctor",
        help="what is installed, what `auto` would choose here, what is wrong",
        epilog="example:\n  scale doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.set_defaults(run=_doctor)

    plot = verbs.add_parser(
        "plot",
        help="draw the curves of one or several runs",
        epilog="example:\n  scale plot runs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plot.add_argument("runs", nargs="+", type=Path, help="run folders; several are drawn over each other")
    plot.add_argument("--out", type=Path, help="folder for the pictures (default: RUN/plots)")
    plot.set_defaults(run=_plot)


def _train(args: argparse.Namespace) -> int:
    from scale.cli.launched import told_to_launcher

    with told_to_launcher(args.stop) as launcher, guarded_output(goes_on=True):
        code = _train_here(args)
        return launcher.exit_code(code)


def _train_here(args: argparse.Namespace) -> int:
    from scale.config import load_config
    from scale.hub import need

    if os.environ.get("WORLD_SIZE", "1") == "1":  # mistakes in the config show before torch is imported
        early = load_config(args.config, args.overrides)
        need(early.hub_names(), early.hub_data())
    from scale.parallel.ranks import join, leave, lost_peers_in_one_line

    if args.split < 1:
        raise UsageError(f"--split = {args.split}: expected 1 or more")
    with lost_peers_in_one_line():
        ranks = join(device=None)
        config = ranks.each(lambda: load_config(args.config, args.overrides))
        ranks.each(lambda: need(config.hub_names(), config.hub_data()))
        if args.new:
            from scale.monitor.run_folder import new_name

            config = config.model_copy(update={"name": ranks.lead(lambda: new_name(config.name))})
        from scale.build import build_trainer
        from scale.monitor.progress import facts_table

        trainer = build_trainer(config, [key for key in args.allow_change.split(",") if key], ranks, args.split)
        if ranks.rank == 0:
            facts_table(trainer.recorder.facts)
        outcome = "dry run" if args.dry_run else trainer.fit(args.stop)
        ranks.barrier()  # none closes its connections while another still reads from them
    leave()
    if args.dry_run:
        return EXIT_OK
    if ranks.rank == 0:
        print(f"{outcome}: step {trainer.loop.done} of {trainer.loop.settings.steps}, {trainer.folder.path}")
    if outcome == "stopped" and trainer.loop.done == 0 and args.stop.reason == "SIGINT":
        return EXIT_INTERRUPTED
    return EXIT_STOPPED if outcome == "stopped" else EXIT_OK


def _doctor(args: argparse.Namespace) -> int:
    from scale.doctor import print_report

    return print_report()


def _plot(args: argparse.Namespace) -> int:
    from scale.files import refuse_same_place
    from scale.monitor.plots import plot_run
    from scale.monitor.run_folder import RunFolder

    for run in map(RunFolder, args.runs):
        if args.out is not None:
            refuse_same_place([run.config, run.run_state, run.metrics, run.checkpoints, run.model], args.out)
    for path in plot_run(args.runs if len(args.runs) > 1 else args.runs[0], args.out):
        print(path)
    return EXIT_OK
