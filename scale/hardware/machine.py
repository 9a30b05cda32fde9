"""One device as it is: a value, printed and without side effects."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from scale.cards import Card, card, card_named
from scale.errors import UsageError


@dataclass(frozen=True)
class Hardware:
    """One device of this process. `memory` is its total memory in bytes, `count` how many such devices this machine has.

    `facts` are the datasheet's, if the card is known.
    """

    device: str
    name: str
    memory: int
    cores: int
    capability: tuple[int, int] | None = None
    count: int = 1

    @property
    def facts(self) -> Card | None:
        return card_named(self.name) if self.device == "cuda" else None

    def peak(self, precision: str) -> float | None:
        """Dense FLOP/s by the datasheet in bf16 or fp8; None where it does not say."""
        teraflops = getattr(self.facts, precision, None)
        return teraflops * 1e12 if teraflops else None

    @property
    def bandwidth(self) -> float | None:
        """Bytes of its memory read in a second, by the datasheet."""
        return self.facts.bandwidth * 1e9 if self.facts else None

    @classmethod
    def of(cls, short: str, count: int = 1) -> Hardware:
        """A card that need not be here ("h100"), for planning. Raises UsageError for an unknown one."""
        found = card(short)
        return cls("cuda", found.title, found.memory * 2**30, _cores(), found.capability, count)


def detect(device: str = "auto", index: int | None = None) -> Hardware:
    """Look at this machine. Raises UsageError if the device asked for is not there.

    `index`: which GPU; default: torch's current one.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        there = ", ".join(name for name, ok in available.items() if ok)
        raise UsageError(
            f"compute.device = {device!r}: torch {torch.__version__} finds no such device (it has: {there})"
        )
    if device == "cuda":
        facts = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
        capability = (facts.major, facts.minor)
        return Hardware("cuda", facts.name, facts.total_memory, _cores(), capability, torch.cuda.device_count())
    if device == "mps":
        return Hardware("mps", "Apple GPU", torch.mps.recommended_max_memory(), _cores())
    return Hardware(device, _cpu_name(), host_memory(), _cores())


def sum_dtype(device: str | torch.device) -> torch.dtype:
    """What sums over many tokens are kept in: float64, where the device has it (MPS has not)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def installed(package: str) -> bool:
    """Whether a package could be imported; it is not."""
    return find_spec(package) is not None


def host_memory() -> int:
    """Bytes this process may use: the machine's, or its control group's if that is less."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return ram
    return min([ram, *group_limits(groups, Path("/sys/fs/cgroup"))])


def group_limits(groups: str, root: Path) -> list[int]:
    """Memory limits that control groups v2 and v1 set, from the content of /proc/self/cgroup; those above bind as well."""
    limits = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        inside = Path(path.lstrip("/"))
        for folder in (inside, *inside.parents):
            try:
                text = (mount / folder / name).read_text(encoding="utf-8").strip()
            except OSError:  # a container sees only its own part of the tree
                continue
            if text.isdigit():  # not "max"
                limits.append(int(text))
    return limits


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
