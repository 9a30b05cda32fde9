"""`scale plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scale.errors import EXIT_OK, UsageError

EXAMPLES = """\
examples:
  scale plan configs/pretrain/7b.yaml --gpus 1024 --gpu h100
  scale plan configs/pretrain/7b.yaml compute.recompute=1 --gpus 8 --gpu h200 --mfu 0.45
  scale plan configs/pretrain/1b.yaml train.tokens=20B --gpus 1 --gpu 4090 --json
"""


def add_commands(verbs: Any) -> None:
    """Add the verb to a parser."""
    plan = verbs.add_parser(
        "plan",
        help="memory, FLOPs and days of a run on cards that need not be here",
        description="Say what a run would hold, compute and take on GPUs that need not be here, and which setting to change "
        "if it does not fit. Neither data nor a GPU are needed: a step runs on tensors without memory.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("config", type=Path, help="YAML file")
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace those of the file")
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs altogether")
    plan.add_argument("--gpu", required=True, metavar="NAME", help="their kind, such as h100")
    plan.add_argument("--mfu", type=float, default=0.4, metavar="F", help="share of the peak FLOP/s (default 0.4)")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    if args.gpus < 1:
        raise UsageError(f"--gpus {args.gpus}: expected 1 or more")
    if not 0 < args.mfu <= 1:
        raise UsageError(f"--mfu {args.mfu:g}: expected a share above 0 and at most 1, such as 0.4")
    from scale.cards import card_to_plan
    from scale.config import load_config

    card_to_plan(args.gpu)  # mistakes show before torch is imported
    config = load_config(args.config, args.overrides)
    from scale.plan.hub import need_hub

    need_hub(config)
    from scale.plan.advice import advise
    from scale.plan.faster import faster
    from scale.plan.plan import make_plan
    from scale.plan.settle import planned
    from scale.plan.table import print_plan

    hardware = planned(args.gpu)
    with _progress() as say:
        plan = make_plan(config, args.gpus, hardware, args.mfu, say)
        knobs = faster(plan, say) if plan.fits else advise(plan, say)
    if args.json:
        print(json.dumps(plan.to_json() | {"advice": [vars(knob) for knob in knobs]}, indent=2))
    else:
        print_plan(plan, knobs)
    return EXIT_OK


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """One changing line in a terminal, one line after the other elsewhere; on stderr, as stdout is for the plan."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    with console.status("building the model") as status:
        yield status.update
