"""A command in a process group of its own, bounded in time, that ends with the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from functools import partial

from scale.lifeline import die_with


def run_child(command: list[str], seconds: float) -> str | None:
    """None if it ended well, else why it did not: the last line of what it said, or that it took too long."""
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        preexec_fn=partial(die_with, os.getpid()),  # or it would keep the GPU
    )
    try:
        said, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return "not run to its end: no time left"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with the workers that compile for it
        child.wait()
    if child.returncode == 0:
        return None
    print(said[-4000:], flush=True)
    lines = [line for line in said.splitlines() if line.strip()]
    return f"failed ({child.returncode}): {lines[-1].strip()[:200] if lines else 'said nothing'}"
