"""What a rank owes the launcher that started it: tell it how it ended.

The launcher names a file in SCALE_OUTCOME. The first rank of the machine that ends otherwise than completed makes it, so
that the first error is the one shown; torchrun itself would turn every exit code into 1.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from scale.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, Elsewhere, LostRank, ScaleError, one_line
from scale.train.stop import StopSignal

EXIT_SECONDS = 4.0
"""How long libraries may take for what they do at exit."""


def error_line(error: ScaleError) -> str:
    """The text of an error, with the rank where there are several and it is not the same on all."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return str(error) if alone or error.shared or "RANK" not in os.environ else f"rank {os.environ['RANK']}: {error}"


def prints_errors() -> bool:
    """Not so rank 0 under a launcher: they share a terminal, and the launcher prints the first error, once and last."""
    return "SCALE_OUTCOME" not in os.environ or os.environ.get("RANK") != "0"


def end_process(code: int) -> NoReturn:
    """End here and now, with this exit code, all written and what libraries registered for the exit done: it takes seconds
    to take the interpreter down after torch, and a rank is taken down beside threads of process groups that may still
    run, so that now and then C++ aborts (exit -6). No signal makes another exit code of it any more."""
    if threading.current_thread() is threading.main_thread():
        for number in StopSignal.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    late = threading.Timer(EXIT_SECONDS, os._exit, [code])
    late.daemon = True
    late.start()
    with suppress(Exception):  # of a library; a stream that is closed
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


class Launcher:
    """The launcher of this rank, if there is one."""

    def __init__(self) -> None:
        name = os.environ.get("SCALE_OUTCOME")
        self.outcome = Path(name) if name else None
        self.alone = os.environ.get("WORLD_SIZE", "1") == "1"

    def exit_code(self, code: int) -> int:
        """The exit code for the process: 0 also for a stop on request, or torchrun would kill the ranks that still write."""
        if code != EXIT_STOPPED or self.outcome is None:
            return code
        self.tell(code, "stopped on request")
        return EXIT_OK

    def tell_interrupted(self, code: int) -> None:
        """Leave how a signal ended the rank before its time."""
        if code == EXIT_STOPPED:
            self.tell(code, "stopped on request before training began", lost=True)  # or over a rank that failed
        else:
            self.tell(EXIT_FAILED, f"rank {os.environ.get('RANK', '0')}: interrupted by Ctrl-C")

    def tell(self, code: int, text: str, lost: bool = False) -> None:
        """Leave the outcome, unless another rank has. `lost`: another rank is gone and knows more."""
        if self.outcome is None:
            return
        note = json.dumps({"rank": int(os.environ.get("RANK", "0")), "exit_code": code, "text": text, "lost": lost})
        aside = self.outcome.with_name(f"{self.outcome.name}.{os.getpid()}")
        with suppress(
            OSError
        ):  # a full disk must not hide what the rank has to say; FileExistsError: another was first
            aside.write_text(note, encoding="utf-8")
            os.link(aside, self.outcome)  # whole or not at all, and only once
        with suppress(OSError):
            aside.unlink()


def end_interrupted(code: int) -> None:
    """End the process at once, with this exit code. A launcher knows."""
    Launcher().tell_interrupted(code)
    os._exit(code)


@contextmanager
def told_to_launcher(stop: StopSignal | None = None) -> Iterator[Launcher]:
    """Whatever ends the rank, its launcher knows. `stop`: the signals of this process, if it hears them."""
    launcher = Launcher()
    try:
        yield launcher
    except Elsewhere as error:  # the rank that failed may be on another machine: this one's launcher hears of it here
        launcher.tell(error.exit_code, str(error))
        raise
    except ScaleError as error:
        first = launcher.alone or _first_to_fail(str(error))
        launcher.tell(error.exit_code, error_line(error), lost=isinstance(error, LostRank))
        if not first:
            raise Elsewhere(str(error), error.exit_code) from None
        raise
    except MemoryError as error:
        text = "out of host memory (fewer ranks on this machine, or more memory for each)"
        launcher.tell(EXIT_FAILED, f"rank {os.environ.get('RANK', '0')}: {text}")
        raise ScaleError(text) from error
    except BaseException as error:
        if stop is not None and stop.exit_code is not None:
            launcher.tell_interrupted(stop.exit_code)
        else:
            launcher.tell(EXIT_FAILED, f"rank {os.environ.get('RANK', '0')}: {one_line(error)}")
        raise


def _first_to_fail(text: str) -> bool:
    from scale.parallel.ranks import first_to_fail  # torch: a mistake in the config shows without waiting for it

    return first_to_fail(text)
