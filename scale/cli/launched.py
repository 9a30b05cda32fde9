"""What a rank owes the launcher that started it: tell it how it ended.

The launcher names a file in SCALE_OUTCOME. The first rank of the machine that ends otherwise than completed makes it, so
that the first error is the one shown; torchrun itself would turn every exit code into 1.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scale.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, Elsewhere, LostRank, ScaleError


def error_line(error: ScaleError) -> str:
    """The text of an error, with the rank where there are several and it is not the same on all."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return str(error) if alone or error.shared or "RANK" not in os.environ else f"rank {os.environ['RANK']}: {error}"


def prints_errors() -> bool:
    """Not so rank 0 under a launcher: they share a terminal, and the launcher prints the first error, once and last."""
    return "SCALE_OUTCOME" not in os.environ or os.environ.get("RANK") != "0"


def end_rank(code: int) -> int:
    """The exit code. A rank among others ends here and now, with everything written: at a normal exit the interpreter is
    taken down beside threads of process groups that may still run, and now and then C++ aborts over one (exit -6)."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


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

    def tell(self, code: int, text: str, lost: bool = False) -> None:
        """Leave the outcome, unless another rank has. `lost`: another rank is gone and knows more."""
        if self.outcome is None:
            return
        note = json.dumps({"rank": int(os.environ.get("RANK", "0")), "exit_code": code, "text": text, "lost": lost})
        aside = self.outcome.with_name(f"{self.outcome.name}.{os.getpid()}")
        aside.write_text(note, encoding="utf-8")
        try:
            os.link(aside, self.outcome)  # whole or not at all, and only once
        except FileExistsError:
            pass
        finally:
            aside.unlink()


@contextmanager
def told_to_launcher() -> Iterator[Launcher]:
    """Whatever ends the rank, its launcher knows."""
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
        launcher.tell(
            EXIT_FAILED, " ".join(f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {error}".split())
        )
        raise


def _first_to_fail(text: str) -> bool:
    from scale.parallel.ranks import first_to_fail  # torch: a mistake in the config shows without waiting for it

    return first_to_fail(text)
