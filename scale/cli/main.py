"""`scale VERB`: parse, call, translate errors into one line and an exit code. Heavy imports wait until a verb runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from scale import __version__
from scale.cli import data, forecast, model, plan, train
from scale.cli.characters import cannot_encode, print_everything
from scale.cli.launched import end_rank, error_line, prints_errors
from scale.cli.quiet import quiet_libraries
from scale.cluster.lifeline import die_with_launcher
from scale.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, Elsewhere, ScaleError

EXIT_CODES = """\
exit codes:
  0   done
  1   failed (the last line says why)
  2   wrong config, argument or data; nothing was started
  130 interrupted by Ctrl-C before training began
  75  stopped on request after writing a checkpoint: run the same command again to go on
  76  one of several ranks ran out of memory: launchers start again with smaller micro-batches
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, like every other error. Its sub-parsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"scale: error: {message} (see `{self.prog} --help`)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sub-parser sets `run`, a function of the namespace that returns the exit code."""
    parser = Parser(
        prog="scale",
        description="Train language models from one laptop to a GPU cluster.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"scale {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    train.add_commands(verbs)
    model.add_commands(verbs)
    plan.add_commands(verbs)
    forecast.add_commands(verbs)
    data_parser = verbs.add_parser("data", help="tokenize, validate, clean, split, inspect data")
    data.add_commands(data_parser.add_subparsers(title="data verbs", metavar="VERB", required=True))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    print_everything()
    die_with_launcher()
    quiet_libraries()
    # GNU OpenMP lets waiting threads spin for long: two runs on the same cores then starve each other
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    parser = make_parser()
    args, rest = parser.parse_known_args(arguments)
    if hasattr(args, "overrides"):  # argparse takes positional arguments only before the options
        args.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in args.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return end_rank(int(args.run(args) or EXIT_OK))
    except Elsewhere as error:
        return end_rank(error.exit_code)
    except ScaleError as error:
        if prints_errors():
            print(f"scale: error: {error_line(error)}", file=sys.stderr)
        return end_rank(error.exit_code)
    except BrokenPipeError:
        return EXIT_OK  # the reader of our output (head, less) has seen enough
    except KeyboardInterrupt:
        print("scale: interrupted", file=sys.stderr)
        return 130
    except UnicodeEncodeError as error:
        print(f"scale: error: {cannot_encode(error)}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"scale: error: {place}{' '.join((error.strerror or str(error)).split())}", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
