"""Errors a user can cause or mend, and the exit codes of every `scale` command."""

EXIT_OK = 0
EXIT_FAILED = 1
"""The run or command failed; the last line on stderr says why."""
EXIT_USAGE = 2
"""Wrong config, argument or input data: nothing was started."""
EXIT_STOPPED = 75
"""Stopped on request (SIGTERM, SIGUSR1, SIGHUP, Ctrl-C) after writing a checkpoint, or, but for Ctrl-C, before training
began: run the same command again to go on."""
EXIT_MEMORY = 76
"""One of several ranks ran out of memory: launchers start all again from the last checkpoint with smaller micro-batches."""
EXIT_INTERRUPTED = 130
"""Interrupted by Ctrl-C before training began, or by a second one: nothing was written since the last checkpoint."""
EXIT_BROKEN_PIPE = 141
"""The reader of the output has gone: the code of any program that SIGPIPE ends (128 + 13)."""


class ScaleError(Exception):
    """A failure that one line explains: what happened, where, and what to do. Printed without a traceback.

    `shared`: the same on every rank, so that naming one would mislead.
    """

    exit_code = EXIT_FAILED
    shared = False


class UsageError(ScaleError):
    """A wrong value from the user (config, argument, data): says the value, the place and the fix."""

    exit_code = EXIT_USAGE


class MissingExtra(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} needs an extra that is not installed: pip install 'scale-trainer[{extra}]'")


class OutOfMemory(ScaleError):
    """Memory ran out on one of several ranks, whose collectives no longer match: only a new start can go on."""

    exit_code = EXIT_MEMORY


class LostRank(ScaleError):
    """Another rank is gone or does not answer."""


class Elsewhere(ScaleError):
    """Another rank failed and says why; this one ends with the same exit code and says nothing."""

    def __init__(self, text: str, exit_code: int = EXIT_FAILED):
        super().__init__(text)
        self.exit_code = exit_code


def one_line(error: BaseException) -> str:
    """What an exception says, in one line that is never empty or a bare number: with its kind, unless it is ours."""
    text = " ".join(str(error).split())
    if isinstance(error, ScaleError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
