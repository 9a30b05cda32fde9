"""Processes that end with the one that started them, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal

PARENT = "SCALE_PARENT"
"""Environment variable in which whoever starts a rank names itself (a process id)."""
_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Ask Linux to kill this process as soon as its parent (a process id) is gone. Kept across exec."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_launcher() -> None:
    """`die_with` the process that SCALE_PARENT names, if there is one: only the starter knows its id for certain, as a
    rank whose parent is gone already would find that of its next one. What this process starts is not bound by it."""
    parent = os.environ.pop(PARENT, None)
    if parent is not None:
        die_with(int(parent))
