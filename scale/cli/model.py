"""`scale generate` and `scale export`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from scale.errors import EXIT_OK, UsageError


def add_commands(verbs: Any) -> None:
    """Add the verbs to a parser."""
    generate = verbs.add_parser(
        "generate",
        help="continue prompts with a trained model",
        description="Continue prompts with the model of a run or of a Hugging Face folder.",
        epilog='example:\n  scale generate runs/demo --prompt "def main(" --max-new-tokens 40',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate.add_argument("model", type=Path, help="run folder or exported folder")
    generate.add_argument("--prompt", action="append", help="may be given several times; default: start a document")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.8, help="0: greedy")
    generate.add_argument("--top-k", type=int, default=40)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    generate.set_defaults(run=_generate)

    export = verbs.add_parser(
        "export",
        help="write a run's model as a Hugging Face folder",
        description="Write a run's newest (or a chosen) checkpoint as a folder that from_pretrained loads.",
        epilog="example:\n  scale export runs/demo --out exports/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("run_folder", type=Path, help="run folder")
    export.add_argument("--out", type=Path, required=True, help="folder to make")
    export.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    export.add_argument("--merge", action="store_true", help="fold a LoRA adapter into the base weights")
    export.add_argument("--shadow", action="store_true", help="the best predicted weights instead of the trained ones")
    export.set_defaults(run=_export)


def _generate(args: argparse.Namespace) -> int:
    if not 0 <= args.temperature < math.inf:
        raise UsageError(f"--temperature {args.temperature:g}: should be 0 (greedy) or more, such as 0.8")
    for name, least, most in (("max_new_tokens", 1, 2**31), ("top_k", 0, 2**31), ("seed", 0, 2**63 - 1)):
        if not least <= getattr(args, name) <= most:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} {getattr(args, name)}: should be from {least} to {most}")
    from scale.evaluate.generate import generate
    from scale.load import load_model

    model, tokenizer = load_model(args.model, args.step)
    if tokenizer is None:
        raise UsageError(f"{args.model}: has no tokenizer (it was trained on bare token ids)")
    texts = generate(
        model, tokenizer, args.prompt or [""], args.max_new_tokens, args.temperature, args.top_k, args.seed
    )
    for text in texts:
        print(text)
        print("-" * 40)
    return EXIT_OK


def _export(args: argparse.Namespace) -> int:
    from scale.checkpoint.export import check_free, export
    from scale.load import load_run

    check_free(args.out)
    model, tokenizer = load_run(args.run_folder, args.step, args.shadow)
    print(export(model, tokenizer, args.out, args.merge))
    return EXIT_OK
