"""What can be known about a process that was killed."""

from __future__ import annotations

import signal
from pathlib import Path

_HINTS = {
    signal.SIGKILL: "by a person or a scheduler, or by the kernel's out-of-memory killer: `dmesg` tells which",
    signal.SIGBUS: "often a full /dev/shm, or a file that became shorter while it was read: `df /dev/shm` tells",
    signal.SIGSEGV: "a fault in native code",
}


def by_signal(number: int, out_of_memory: str | None = None) -> str:
    """Words for the end of a process by a signal. `out_of_memory`: what is known of the kernel's out-of-memory killer."""
    try:
        name = f"{signal.Signals(number).name} (signal {number})"
    except ValueError:  # a realtime signal
        return f"killed by signal {number}"
    hint = _HINTS.get(signal.Signals(number))
    if number == signal.SIGKILL and out_of_memory is not None:
        hint = f"{out_of_memory} (fewer ranks on this machine, or more memory for each)"
    return f"killed by {name}" + (f": {hint}" if hint else "")


class OutOfMemoryKiller:
    """Counts what the kernel's out-of-memory killer does from now on, in this process's control group (its children are
    of it) or, where that does not tell, on this machine."""

    def __init__(self, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")):
        self._proc, self._groups = proc, groups
        self._place, self._before = self._count()

    def said(self) -> str | None:
        """A fact, or None if it killed nothing or cannot be asked."""
        place, now = self._count()
        killed = now - self._before if place == self._place else 0
        if killed <= 0:
            return None
        return (
            f"the kernel's out-of-memory killer ended {killed} process{'es' if killed > 1 else ''} of {place} meanwhile"
        )

    def _count(self) -> tuple[str, int]:
        for place, path in self._counters():
            try:
                fields = dict(line.split()[:2] for line in path.read_text(encoding="ascii").splitlines())
                return place, int(fields["oom_kill"])
            except (OSError, ValueError, KeyError):  # another kernel, or hidden in a container
                continue
        return "nothing", 0

    def _counters(self) -> list[tuple[str, Path]]:
        found = []
        try:
            lines = (self._proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if not controllers:
                found.append(("this control group", self._groups / path.lstrip("/") / "memory.events"))
            elif "memory" in controllers.split(","):
                found.append(("this control group", self._groups / "memory" / path.lstrip("/") / "memory.oom_control"))
        return [*found, ("this machine", self._proc / "vmstat")]
