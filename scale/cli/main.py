"""`scale VERB`: parse, call, translate errors into one line and an exit code. Heavy imports wait until a verb runs."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from scale import __version__
from scale.cli.characters import cannot_encode, print_everything
from scale.cli.last_resort import LastResort
from scale.cli.launched import end_interrupted, end_process, error_line, prints_errors
from scale.cli.quiet import quiet_libraries
from scale.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    Elsewhere,
    ScaleError,
    one_line,
)
from scale.lifeline import die_with_launcher
from scale.streams import guarded_output, open_standard_streams
from scale.train.stop import StopSignal, stop_file

EXIT_CODES = """\
exit codes:
  0   done
  1   failed (the last line says why)
  2   wrong config, argument or data; nothing was started
  130 interrupted by Ctrl-C before training began, or by a second Ctrl-C
  75  stopped on request after writing a checkpoint, or before training began: run the same command again to go on
  76  one of several ranks ran out of memory: launchers start again with smaller micro-batches
  141 the reader of the output (head, less) has gone; a run that trains goes on
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, like every other error. Its sub-parsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"scale: error: {_with_nearest(message)} (see `{self.prog} --help`)\n")


def _with_nearest(message: str) -> str:
    """Argparse's "invalid choice: 'trian' (choose from ...)", with the name that was probably meant."""
    found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message)
    if found is None:
        return message
    known = [name.strip(" '") for name in found[2].split(",")]
    near = get_close_matches(found[1], known, n=1)
    return f"{message}; did you mean {near[0]}?" if near else message


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sub-parser sets `run`, a function of the namespace that returns the exit code."""
    from scale.cli import data, forecast, model, plan, train

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
    """Entry point. Returns the exit code; without arguments it is the program and ends the process with it."""
    stop = StopSignal(phase="before")
    end = LastResort(stop, end_interrupted, stop_file())
    if arguments is None:
        _program(stop, end)
    with stop, end:
        return _run(arguments, stop)


def _program(stop: StopSignal, end: LastResort) -> NoReturn:
    code = EXIT_FAILED
    try:
        stop.__enter__()
        end.__enter__()
        die_with_launcher()
        # GNU OpenMP lets waiting threads spin for long: two runs on the same cores then starve each other
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        open_standard_streams()
        code = _run(sys.argv[1:], stop)
    except SystemExit as error:  # of argparse
        code = error.code if isinstance(error.code, int) else EXIT_FAILED
    except KeyboardInterrupt as error:
        code = _interrupted(stop, error)
    except BaseException:
        traceback.print_exc()
    stop.phase = "after"
    end_process(code)


def _run(arguments: Sequence[str] | None, stop: StopSignal) -> int:
    """Exit code of a verb, whose errors are told in one line."""
    print_everything()
    quiet_libraries()
    with guarded_output() as output:
        try:
            code = _call(arguments, stop)
            sys.stdout.flush()
            return code
        except BaseException as error:
            if stop.exit_code is not None or isinstance(error, KeyboardInterrupt):
                return _interrupted(stop, error)  # whatever a library has made of it
            if output.reader_gone:
                return EXIT_BROKEN_PIPE
            return _failed(error)


def _call(arguments: Sequence[str] | None, stop: StopSignal) -> int:
    parser = make_parser()
    args, rest = parser.parse_known_args(arguments)
    if hasattr(args, "overrides"):  # argparse takes positional arguments only before the options
        args.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in args.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.stop = stop
    try:
        return int(args.run(args) or EXIT_OK)
    except SystemExit as error:  # no verb of ours ends like this
        raise ScaleError(f"a library ended the program: {one_line(error)}") from error


def _interrupted(stop: StopSignal, error: BaseException) -> int:
    by = f" by {stop.reason}" if stop.reason not in (None, "SIGINT") else ""
    what = f": {error}" if isinstance(error, KeyboardInterrupt) and str(error) else ""
    if prints_errors():
        print(f"scale: interrupted{by}{what}", file=sys.stderr)
    return stop.exit_code or EXIT_INTERRUPTED


def _failed(error: BaseException) -> int:
    """Exit code of an error that a user can understand; raises every other one again."""
    if isinstance(error, Elsewhere):
        return error.exit_code
    if isinstance(error, ScaleError):
        if prints_errors():
            print(f"scale: error: {error_line(error)}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, UnicodeEncodeError):
        print(f"scale: error: {cannot_encode(error)}", file=sys.stderr)
        return EXIT_FAILED
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        print(f"scale: error: {place}{' '.join((error.strerror or str(error)).split())}", file=sys.stderr)
        return EXIT_FAILED
    raise error


if __name__ == "__main__":
    sys.exit(main())
