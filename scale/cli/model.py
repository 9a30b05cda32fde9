"""`scale generate` and `scale export`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale.cli.characters import as_utf8
from scale.errors import EXIT_OK, UsageError

if TYPE_CHECKING:
    from scale.evaluate.generate import Continuation


def add_commands(verbs: Any) -> None:
    """Add the verbs to a parser."""
    generate = verbs.add_parser(
        "generate",
        help="continue prompts with a trained model",
        description="Continue prompts with the model of a run, of a Hugging Face folder or of an exported adapter.",
        epilog='example:\n  scale generate runs/demo --prompt "def main(" --max-new-tokens 40',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate.add_argument("model", type=Path, help="run folder or exported folder")
    generate.add_argument("--prompt", action="append", help="may be given several times; default: start a document")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.8, help="0: greedy")
    generate.add_argument("--top-k", type=int, default=40, help="0: all tokens")
    generate.add_argument("--seed", type=int, default=0)
    _add_which(generate)
    generate.add_argument("--json", action="store_true", help="print JSON: prompt, continuation, tokens, ended")
    generate.set_defaults(run=_generate)

    export = verbs.add_parser(
        "export",
        help="write a run's model as a Hugging Face folder",
        description="Write a run's newest (or a chosen) checkpoint as a folder that from_pretrained loads. Before it is put "
        "in place it is loaded again: logits and greedy generation must be those of the run.",
        epilog="examples:\n  scale export runs/demo --out exports/demo\n  scale export runs/lora --out exports/lora --best "
        "--merge --dtype bf16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("run_folder", type=Path, help="run folder")
    export.add_argument("--out", type=Path, required=True, help="folder to make")
    _add_which(export)
    export.add_argument("--merge", action="store_true", help="fold a LoRA adapter into the base weights")
    export.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of the weights (default: that of the base model's files; fp32 for a model made here, and for an adapter)",
    )
    export.set_defaults(run=_export)


def _add_which(parser: Any) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="checkpoint of the lowest held-out loss")


def _generate(args: argparse.Namespace) -> int:
    if not 0 <= args.temperature < math.inf:
        raise UsageError(f"--temperature {args.temperature:g}: should be 0 (greedy) or more, such as 0.8")
    for name, least, most in (("max_new_tokens", 1, 2**31), ("top_k", 0, 2**31), ("seed", 0, 2**63 - 1)):
        if not least <= getattr(args, name) <= most:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} {getattr(args, name)}: should be from {least} to {most}")
    from scale.evaluate.generate import continuations
    from scale.load import load_model

    model, tokenizer = load_model(args.model, args.step, args.best)
    if tokenizer is None:
        raise UsageError(f"{args.model}: has no tokenizer (it was trained on bare token ids)")
    prompts = [as_utf8(prompt) for prompt in args.prompt or [""]]
    made = continuations(model, tokenizer, prompts, args.max_new_tokens, args.temperature, args.top_k, args.seed)
    if args.json:
        rows = [{"prompt": m.prompt, "continuation": m.text, "tokens": m.tokens, "ended": m.ended} for m in made]
        print(json.dumps(rows, indent=2))
    else:
        for one in made:
            _print(one)
    return EXIT_OK


def _print(made: Continuation) -> None:
    """Each part below a heading of its own. In a terminal headings are dim, and codes that it would obey are left out."""
    terminal = sys.stdout.isatty()
    why = "ended by the model" if made.ended else "cut at --max-new-tokens"
    parts = {"prompt": made.prompt} if made.prompt else {}
    parts[f"continuation ({made.tokens} tokens, {why})"] = made.text
    for heading, text in parts.items():
        print(f"\x1b[2m--- {heading}\x1b[0m" if terminal else f"--- {heading}")
        print(_without_controls(text) if terminal else text)


def _without_controls(text: str) -> str:
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _export(args: argparse.Namespace) -> int:
    from scale.checkpoint.export import DTYPES, check_free, export
    from scale.files import refuse_same_place
    from scale.load import load_trained
    from scale.monitor.run_folder import RunFolder

    folder = RunFolder(args.run_folder)
    refuse_same_place([folder.config, folder.checkpoints, folder.model], args.out)
    check_free(args.out)
    run = load_trained(args.run_folder, args.step, args.best)
    adapter = hasattr(run.model, "peft_config") and not args.merge
    dtype = DTYPES[args.dtype] if args.dtype else DTYPES["fp32"] if adapter else run.dtype
    print(export(run.model, run.tokenizer, args.out, args.merge, dtype, run.generation, run.base))
    return EXIT_OK
