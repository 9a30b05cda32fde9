"""`scale data ...`: tokenize, validate, clean, split, inspect. Imports wait until a command runs, so that --help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scale.cli.characters import as_utf8
from scale.errors import EXIT_FAILED, EXIT_OK, UsageError

if TYPE_CHECKING:
    from scale.config.data import Source

Run = Callable[[argparse.Namespace], int]

_SOURCE_HELP = "file, folder, glob, token store, python-stdlib, or hf:org/name"
_KINDS = ("python-stdlib", "text", "jsonl", "csv", "parquet", "huggingface", "tokens", "packed")


def add_commands(sub: argparse._SubParsersAction) -> None:
    """Add the data commands to a parser's sub-commands; each sets `run`, which returns an exit code."""
    tokenize = _command(
        sub,
        "tokenize",
        _tokenize,
        "Turn raw data into a token store: memory-mapped shards, a manifest and the tokenizer.",
        "scale data tokenize python-stdlib --out data/stdlib --vocab-size 4096",
    )
    tokenize.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the token store")
    which = tokenize.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", metavar="PATH", help="folder, tokenizer.json or Hugging Face name")
    which.add_argument("--vocab-size", type=int, metavar="N", help="train a byte-level BPE with N entries on this data")
    tokenize.add_argument("--held-out", type=float, default=0.01, metavar="F", help="share held out (default 0.01)")
    tokenize.add_argument("--dtype", choices=("auto", "uint16", "uint32"), default="auto", help="type of stored ids")

    _command(
        sub,
        "validate",
        _validate,
        "Read everything once and report encoding, JSON, columns, types, empty and repeated rows; hashes of a token store.",
        "scale data validate python-stdlib",
    )

    clean = _command(
        sub,
        "clean",
        _clean,
        "Write the good rows as JSONL: normalised text, nothing empty, too short, too long or repeated.",
        "scale data clean python-stdlib --out data/clean.jsonl --min-chars 200",
    )
    clean.add_argument("--out", metavar="FILE", required=True, help="JSONL file to write (replaced if it exists)")
    clean.add_argument("--min-chars", type=int, default=1, metavar="N", help="drop shorter texts")
    clean.add_argument("--max-chars", type=int, metavar="N", help="drop longer texts")
    clean.add_argument("--near", type=float, metavar="S", help="drop near duplicates of similarity S or more, e.g. 0.8")

    split = _command(
        sub,
        "split",
        _split,
        "Divide rows into train.jsonl and valid.jsonl by hash; equal rows stay on one side. The same data always divides "
        "alike; rows added or removed may move a few others, because the share of validation rows is kept.",
        "scale data split python-stdlib --out data/parts --fraction 0.1",
    )
    split.add_argument("--out", metavar="FOLDER", required=True, help="folder for train.jsonl and valid.jsonl")
    split.add_argument(
        "--fraction", type=float, default=0.1, metavar="F", help="share of validation rows (default 0.1)"
    )
    split.add_argument("--by", metavar="COLUMN", help="keep rows with the same value of this column on one side")

    inspect = _command(
        sub,
        "inspect",
        _inspect,
        "Show counts, lengths, columns and the first documents of raw data or a token store.",
        "scale data inspect python-stdlib --samples 1",
    )
    inspect.add_argument("--tokenizer", metavar="PATH", help="count lengths in tokens of this tokenizer")
    inspect.add_argument("--samples", type=int, default=3, metavar="N", help="documents to show (default 3)")


def _command(sub: argparse._SubParsersAction, name: str, run: Run, description: str, example: str) -> Any:
    parser = sub.add_parser(
        name,
        help=description.split(":")[0].split(";")[0].rstrip("."),
        description=description,
        epilog=f"example: {example}",
    )
    parser.set_defaults(run=run)
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE_HELP)
    reading = parser.add_argument_group("how to read SOURCE")
    reading.add_argument("--kind", choices=_KINDS, help="default: told from the file ending")
    reading.add_argument(
        "--text", metavar="COLUMN", help='column with the text, or a template such as "{title}\\n{body}"'
    )
    reading.add_argument("--input-ids", metavar="COLUMN", help="column with token ids")
    reading.add_argument(
        "--labels", metavar="COLUMN", help="column aligned with the ids, -100 where nothing is learned"
    )
    reading.add_argument(
        "--split", metavar="NAME", help="text: file, paragraph or line; Hugging Face: name of the split"
    )
    reading.add_argument("--delimiter", metavar="C", help="CSV: between two fields (default: tab in .tsv, else comma)")
    reading.add_argument("--config", metavar="NAME", help="configuration of a Hugging Face dataset")
    reading.add_argument(
        "--streaming", action="store_true", default=None, help="read a Hugging Face dataset as a stream"
    )
    reading.add_argument(
        "--max-documents", type=int, metavar="N", help="stop after N documents of a Hugging Face dataset"
    )
    return parser


def _source(args: argparse.Namespace) -> Source:
    from scale.data.tools import source_from

    columns = {k: getattr(args, k) for k in ("text", "input_ids", "labels") if getattr(args, k) is not None}
    if "text" in columns:
        columns["text"] = as_utf8(columns["text"]).replace("\\n", "\n")  # a shell passes the two characters
    options = {k: getattr(args, k) for k in ("split", "delimiter", "config", "streaming", "max_documents")}
    return source_from(args.source, args.kind, columns=columns or None, **options)


def _tokenize(args: argparse.Namespace) -> int:
    from scale.data import tokenizer as tokenizers
    from scale.data.prepare import tokenize, train_tokenizer
    from scale.data.sources import refuse_as_output
    from scale.data.tables import raw_source

    source = raw_source(_source(args), "tokenize")
    refuse_as_output(source, args.out)  # before a tokenizer is trained
    if not 0 <= args.held_out < 1:
        raise UsageError(f"--held-out {args.held_out:g}: a share of at least 0 and below 1, such as 0.01")
    if args.vocab_size is not None and not 258 <= args.vocab_size <= 2**20:
        raise UsageError(
            f"--vocab-size {args.vocab_size}: at least 258 (256 bytes and special tokens), at most {2**20}"
        )
    tokenizer = tokenizers.load(args.tokenizer) if args.tokenizer else None
    if args.vocab_size is not None:
        tokenizer = train_tokenizer([source], args.vocab_size, args.held_out)
    manifest = tokenize(source, args.out, tokenizer, held_out=args.held_out, dtype=args.dtype)
    facts = {
        "documents (train)": sum(s.documents for s in manifest.train),
        "documents (valid)": sum(s.documents for s in manifest.valid),
        "tokens (train)": sum(s.tokens for s in manifest.train),
        "tokens (valid)": sum(s.tokens for s in manifest.valid),
        "type": manifest.dtype,
        "vocabulary": manifest.vocab_size,
        **{f"dropped: {why}": n for why, n in manifest.dropped.items()},
    }
    _print_table(args.out, facts)
    return EXIT_OK


def _validate(args: argparse.Namespace) -> int:
    from scale.data.tools import validate

    result = validate(_source(args))
    _print_table(f"{args.source} ({result.kind})", result.counts | _not_read(result.left_out))
    _print_lines(result.problems)
    _print_lines(["valid" if result.ok else "not valid"])
    return EXIT_OK if result.ok else EXIT_FAILED


def _clean(args: argparse.Namespace) -> int:
    from scale.data.tables import raw_source
    from scale.data.tools import clean

    source = raw_source(_source(args), "clean")
    result = clean(source, args.out, args.min_chars, args.max_chars, args.near)
    _print_table(
        args.out,
        {
            "read": result.read,
            "kept": result.kept,
            "of these changed": result.changed,
            **{f"changed: {what}": n for what, n in result.changes.items()},
            **{f"dropped: {why}": n for why, n in result.dropped.items()},
            **_not_read(result.left_out),
        },
    )
    _print_lines([f"{why}: {example}" for why, examples in result.examples.items() for example in examples])
    return EXIT_OK


def _split(args: argparse.Namespace) -> int:
    from scale.data.tables import raw_source
    from scale.data.tools import split

    result = split(raw_source(_source(args), "split"), args.out, args.fraction, args.by)
    groups = {"train (groups)": result.train_groups, "valid (groups)": result.valid_groups}
    rows = {"train (rows)": result.train, "valid (rows)": result.valid, **groups}
    _print_table(args.out, rows | _not_read(result.left_out))
    return EXIT_OK


def _inspect(args: argparse.Namespace) -> int:
    from scale.data.tools import inspect

    result = inspect(_source(args), args.tokenizer, args.samples)
    _print_table(f"{args.source} ({result.kind})", result.facts | _not_read(result.left_out))
    if result.fields:
        kinds = {name: ", ".join(f"{t} ({n:,})" for t, n in types.items()) for name, types in result.fields.items()}
        _print_table("columns", kinds)
    _print_table(f"length in {result.unit}", result.quantiles)
    most = max((n for _, _, n in result.histogram), default=1)
    bars = {f"{a:,} - {b:,}": f"{n:,} {'#' * -(-40 * n // most)}" for a, b, n in result.histogram}
    _print_table("histogram", bars)
    for i, sample in enumerate(result.samples):
        _print_lines([f"--- document {i}", sample])
    return EXIT_OK


def _not_read(left_out: Mapping[str, int]) -> dict[str, int]:
    return {f"not read: {what}": n for what, n in left_out.items()}


def _print_table(title: str, content: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    _print_lines([title])
    table = Table(show_header=False)
    for name, value in content.items():
        table.add_row(Text(name), Text(f"{value:,}" if isinstance(value, int) else str(value)))
    Console().print(table)


def _print_lines(lines: Sequence[str]) -> None:
    """Text of others, so nothing in it is taken for markup or terminal commands."""
    from rich.console import Console
    from rich.control import strip_control_codes
    from rich.text import Text

    for line in lines:
        Console(soft_wrap=True).print(Text(strip_control_codes(line)))
