"""From what ranks reported to a table and the list of bad ranks. No torch, no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

CLOCK_SECONDS = 2.0
"""More than this between two clocks spoils logs, `make`-like comparisons of file times and tokens that expire."""
GIB = 2**30


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `rank` None: with all of them together."""

    rank: int | None
    host: str
    what: str
    fix: str

    def line(self) -> str:
        """For a person."""
        who = "all ranks" if self.rank is None else f"rank {self.rank} ({self.host})"
        return f"{who}: {self.what}: {self.fix}"


@dataclass
class Findings:
    """What rank 0 knows in the end."""

    world_size: int
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    offsets: dict[int, float] = field(default_factory=dict)
    """Seconds by which the clock of a rank is ahead of that of rank 0."""
    stages: dict[int, str] = field(default_factory=dict)
    """How far each rank came in the collectives."""
    silent: set[int] = field(default_factory=set)
    """Ranks that reported and then stopped giving signs of life."""
    speeds: dict[str, float] = field(default_factory=dict)
    """Collective -> bus bandwidth in GB/s (10^9 bytes); empty if they did not complete."""
    tried: bool = False
    """Whether collectives were tried at all."""

    def host(self, rank: int) -> str:
        """Of a rank, as far as known."""
        return str(self.reports.get(rank, {}).get("host", "unknown host"))


def own_problems(found: Findings) -> list[Problem]:
    """Missing ranks, and what is wrong with single ones."""
    problems = []
    for rank in range(found.world_size):
        host = found.host(rank)
        report = found.reports.get(rank)
        if report is None:
            fix = "is it started, and can its machine reach MASTER_ADDR:MASTER_PORT?"
            problems.append(Problem(rank, host, "never reported", fix))
            continue
        for package, version, common in _odd_versions(report, found.reports):
            what = f"{package} {version}, but {common} on most ranks"
            problems.append(Problem(rank, host, what, "install the same version everywhere"))
        if report["folder"] is not None:
            problems.append(Problem(rank, host, report["folder"], "mount the same writable folder on all machines"))
        if report["gpu"] and "problem" in report["gpu"]:
            fix = "check CUDA_VISIBLE_DEVICES, `nvidia-smi` and the driver there, or leave the machine out"
            problems.append(Problem(rank, host, report["gpu"]["problem"], fix))
        offset = found.offsets.get(rank, 0.0)
        if abs(offset) > CLOCK_SECONDS:
            what = f"its clock is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} that of rank 0"
            problems.append(Problem(rank, host, what, "let NTP or chrony set it"))
    return problems


def together_problems(found: Findings, min_gbps: float) -> list[Problem]:
    """What is wrong with the collectives."""
    problems = [
        Problem(
            rank, found.host(rank), "gives no sign of life since it reported", "look for a stopped process or machine"
        )
        for rank in sorted(found.silent)
    ]
    if found.tried and not found.speeds and not problems:
        problems = _stuck(found)
    for name, speed in found.speeds.items():
        if speed < min_gbps:
            what = f"{name} moves {speed:.2f} GB/s, less than --min-gbps {min_gbps:g}"
            problems.append(
                Problem(None, "", what, "check NCCL_SOCKET_IFNAME, NCCL_IB_HCA and the links (NCCL_DEBUG=INFO)")
            )
    return problems


def _stuck(found: Findings) -> list[Problem]:
    order = ("reported", "joining", "all_reduce", "all_gather", "done")
    reached = {rank: order.index(found.stages.get(rank, "reported").partition(":")[0]) for rank in found.reports}
    failed = [rank for rank in reached if ":" in found.stages.get(rank, "")]
    fix = "open the ports between the machines, or name the interface: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME"
    if len(set(reached.values())) == 1:
        said = next((found.stages[rank].partition(":")[2] for rank in failed), "")
        what = f"{order[next(iter(reached.values()))]} does not complete{said and ' (' + said + ')'}"
        return [Problem(None, "", what, fix)]
    behind = min(reached.values())
    return [
        Problem(rank, found.host(rank), f"does not get beyond {order[behind]!r}", fix)
        for rank, at in reached.items()
        if at == behind
    ]


def _odd_versions(report: Mapping[str, Any], reports: Mapping[int, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    odd = []
    for package, version in report["versions"].items():
        # of two equally common ones the one of the lowest rank counts as right
        [(common, _)] = Counter(reports[rank]["versions"][package] for rank in sorted(reports)).most_common(1)
        if version != common:
            odd.append((package, version, common))
    return odd


def table(found: Findings, problems: list[Problem]) -> Table:
    """One line per rank."""
    shown = Table("rank", "host", "GPU", "python", "torch", "transformers", "deepspeed", "clock", "folder", "verdict")
    bad = {problem.rank for problem in problems}
    for rank in range(found.world_size):
        report = found.reports.get(rank)
        if report is None:
            shown.add_row(str(rank), "?", *"-------", "MISSING")
            continue
        gpu = report["gpu"] or {}
        device = f"{gpu['name']} {gpu['memory'] / GIB:.0f} GiB" if "name" in gpu else "none" if gpu else "not asked"
        numbers = report["versions"]
        packages = [numbers[name] for name in ("python", "torch", "transformers", "deepspeed")]
        clock = f"{found.offsets.get(rank, 0.0):+.1f} s"
        folder = "ok" if report["folder"] is None else "BAD"
        shown.add_row(str(rank), report["host"], device, *packages, clock, folder, "BAD" if rank in bad else "ok")
    return shown
