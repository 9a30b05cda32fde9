"""What is said of a rank that was killed: what is known, and where it is not known, how to find out."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from scale.cluster.attempts import Ended, Outcome, judge
from scale.cluster.killed import OutOfMemoryKiller, by_signal


@pytest.mark.parametrize(
    ("number", "fragments"),
    [
        (signal.SIGKILL, ["killed by SIGKILL (signal 9)", "out-of-memory killer", "`dmesg` tells which"]),
        (signal.SIGBUS, ["killed by SIGBUS (signal 7)", "/dev/shm"]),
        (signal.SIGSEGV, ["killed by SIGSEGV (signal 11)"]),
        (signal.SIGABRT, ["killed by SIGABRT (signal 6)"]),
        (40, ["killed by signal 40"]),
    ],
)
def test_words_for_a_signal(number: int, fragments: list[str]) -> None:
    said = by_signal(number)
    assert all(fragment in said for fragment in fragments) and "out of" not in said


def kernel(folder: Path, kills: int, group: bool) -> None:
    """Files as Linux shows them."""
    (folder / "proc" / "self").mkdir(parents=True, exist_ok=True)
    (folder / "proc" / "self" / "cgroup").write_text("0::/job\n")
    (folder / "proc" / "vmstat").write_text(f"pgfault 7\noom_kill {kills}\n")
    if group:
        (folder / "groups" / "job").mkdir(parents=True, exist_ok=True)
        (folder / "groups" / "job" / "memory.events").write_text(f"low 0\noom 5\noom_kill {kills}\n")


@pytest.mark.parametrize(("group", "place"), [(True, "this control group"), (False, "this machine")])
def test_the_kernel_is_asked_what_it_did(group: bool, place: str, tmp_path: Path) -> None:
    kernel(tmp_path, 3, group)
    killer = OutOfMemoryKiller(tmp_path / "proc", tmp_path / "groups")
    assert killer.said() is None, "what it did before is of no concern"
    kernel(tmp_path, 4, group)
    said = killer.said()
    assert said == f"the kernel's out-of-memory killer ended 1 process of {place} meanwhile"
    outcome = judge(None, [Ended(1, -9)], "LOGS", out_of_memory=said)
    assert outcome.lost and outcome.text.startswith(f"rank 1: killed by SIGKILL (signal 9): {said} (")


def test_a_kernel_that_does_not_tell(tmp_path: Path) -> None:
    assert OutOfMemoryKiller(tmp_path, tmp_path).said() is None


STOPPED = Outcome(75, "stopped on request before training began", lost=True)


def test_a_rank_that_the_agent_ended_over_another_one_was_not_stopped_on_request() -> None:
    ended = [Ended(1, -11), Ended(0, 75)]
    assert "rank 1: killed by SIGSEGV" in judge(STOPPED, ended, "LOGS").text
    assert "rank 1: exited with 3" in judge(STOPPED, [Ended(1, 3), Ended(0, 75)], "LOGS").text
    assert judge(STOPPED, [Ended(1, 75), Ended(0, -15)], "LOGS").exit_code == 75
    assert judge(STOPPED, [Ended(1, 1), Ended(0, 75)], "LOGS", stopping=True).exit_code == 75
