"""The supervisor with ranks that only pretend, under the real torchrun agent."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from scale.cluster.attempts import ECHO_SECONDS
from tests.distributed.harness import ROOT, free_port

LIMIT = 100


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts supervisors of fake ranks; ends them after the test."""
    started = []

    def start(mode: str, *options: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        run = tmp_path / "runs" / "demo"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.fake_launch", str(run), mode, "--ranks-per-node", "2", *options],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, standard output, lines of standard error."""
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err.splitlines()


def pids(folder: Path, count: int) -> list[int]:
    """Process ids of the ranks, once all have started."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        found = [int(text) for file in folder.glob("*.pid") if (text := file.read_text())]
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"ranks did not start in {folder}")


def gone(process_ids: list[int]) -> bool:
    """Whether all of them vanish."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in process_ids):
            return True
        time.sleep(0.05)
    return False


def test_completed(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    code, out, err = ended(launch("ok"))
    assert (code, out) == (0, "rank 0 of 2 split 1 terminal False\n")
    [logs] = (tmp_path / "runs" / "demo" / "logs").iterdir()
    assert (logs / "rank-1.out").read_text() == "rank 1 of 2 split 1 terminal False\n"
    assert (logs / "rank-1.err").read_text() == "warning of rank 1\n"
    assert err == [f"scale: 2 ranks on this node; what ranks other than 0 print: {logs}", "warning of rank 0"]
    assert not list((tmp_path / "runs").glob(".demo*"))


def test_first_error_is_printed_once_and_last(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    code, _, err = ended(launch("fail"))
    assert code == 1
    assert err[-1] == "scale: error: rank 1: the data are bad"
    assert sum("scale: error" in line for line in err) == 1
    assert not (tmp_path / "runs" / "demo").exists()
    [logs] = tmp_path.glob("scale-*")
    assert (logs / "rank-1.err").read_text() == "warning of rank 1\n"
    assert err[1:-1] == ["warning of rank 0"]  # torchrun's own lines go to a file
    assert "closing signal" in (logs / "agent.log").read_text()


def test_usage_error_keeps_its_code(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    code, _, err = ended(launch("usage"))
    assert code == 2
    assert re.fullmatch(r"scale: error: rank [01]: data.path = 'x': no such file", err[-1])
    assert not list(tmp_path.glob("scale-*"))  # the logs say no more than that line


def test_killed_rank_is_named_though_another_one_spoke(launch: Callable[..., subprocess.Popen[str]]) -> None:
    code, _, err = ended(launch("killed"))
    assert code == 1
    assert err[-1].startswith("scale: error: rank 1: killed by SIGKILL")


@pytest.mark.slow
def test_silent_rank(launch: Callable[..., subprocess.Popen[str]]) -> None:
    code, _, err = ended(launch("silent"))
    assert code == 1
    assert err[-1].startswith("scale: error: rank 1: exited with 3 without saying why")


def test_out_of_memory_starts_again_with_smaller_micro_batches(launch: Callable[..., subprocess.Popen[str]]) -> None:
    code, out, err = ended(launch("memory,4"))
    assert code == 0
    assert [line.split()[5] for line in out.splitlines()] == ["1", "2", "4"]
    again = [line for line in err if "starting again" in line]
    assert [("split by 2" in line, "split by 4" in line) for line in again] == [(True, False), (False, True)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_on_request(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: int) -> None:
    process = launch(f"stop,{tmp_path}")
    pids(tmp_path, 2)
    process.send_signal(number)
    code, _, err = ended(process)
    assert code == 75
    assert err[-1] == f"scale: {signal.Signals(number).name}: stopping after a checkpoint (again: at once, without one)"


def test_second_signal_kills(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = launch(f"hang,{tmp_path}")
    ranks = pids(tmp_path, 2)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "stopping" not in process.stderr.readline():
        pass
    time.sleep(1.5 * ECHO_SECONDS)
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 1
    assert "second signal" in err[-1]
    assert gone(ranks)


def test_dead_supervisor_leaves_nobody_behind(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = launch(f"hang,{tmp_path}")
    ranks = pids(tmp_path, 2)
    process.kill()
    assert gone(ranks)


def test_rank_0_writes_to_the_terminal(launch: Callable[..., subprocess.Popen[str]]) -> None:
    controller, terminal = pty.openpty()
    process = launch("ok", stdout=terminal)
    os.close(terminal)
    text = b""
    with suppress(OSError):  # end of a pseudo terminal
        while chunk := os.read(controller, 1024):
            text += chunk
    os.close(controller)
    assert text == b"rank 0 of 2 split 1 terminal True\r\n"
    assert ended(process)[0] == 0


def two_nodes(launch: Callable[..., subprocess.Popen[str]], mode: str) -> list[subprocess.Popen[str]]:
    common = ["--nodes", "2", "--host", "127.0.0.1", "--port", str(free_port())]
    return [launch(mode, *common, "--node-rank", str(node)) for node in (0, 1)]


@pytest.mark.slow
def test_two_nodes(launch: Callable[..., subprocess.Popen[str]]) -> None:
    results = [ended(process) for process in two_nodes(launch, "ok")]
    assert [code for code, _, _ in results] == [0, 0], "\n".join(line for _, _, err in results for line in err)
    assert "".join(out for _, out, _ in results) == "rank 0 of 4 split 1 terminal False\n"


def test_two_nodes_start_again_together(launch: Callable[..., subprocess.Popen[str]]) -> None:
    results = [ended(process) for process in two_nodes(launch, "memory,2")]
    assert [code for code, _, _ in results] == [0, 0], "\n".join(line for _, _, err in results for line in err)
    assert sorted("".join(out for _, out, _ in results).splitlines()) == [
        "rank 0 of 4 split 1 terminal False",
        "rank 0 of 4 split 2 terminal False",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 3])
def test_two_nodes_start_again_though_ranks_do_not_notice(
    launch: Callable[..., subprocess.Popen[str]], rank: int
) -> None:
    """Out of memory on either node: neither its neighbour nor the ranks of the other node would end for 1000 s."""
    results = [ended(process) for process in two_nodes(launch, f"deaf,{rank}")]
    assert [code for code, _, _ in results] == [0, 0], "\n".join(line for _, _, err in results for line in err)
    assert "rank 0 of 4 split 2 terminal False" in "".join(out for _, out, _ in results)
    again = [line for _, _, err in results for line in err if "starting again" in line]
    assert len(again) == 2 and sum("a rank of another node ran out of memory; starting" in line for line in again) == 1


def test_a_second_launcher_leaves_the_first_alone(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    first = launch(f"stop,{tmp_path}")
    pids(tmp_path, 2)
    others = tmp_path / "others"
    others.mkdir()
    second = launch(f"stop,{others}")
    pids(others, 2)
    second.send_signal(signal.SIGINT)
    assert ended(second)[0] == 75
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert ended(first)[0] == 75
    assert not list((tmp_path).glob("runs/.demo*"))


def notes(folder: Path) -> Path:
    return folder / "runs" / ".demo.launch-run"


@pytest.mark.slow
def test_a_second_launcher_of_several_nodes_is_refused(
    launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    both = two_nodes(launch, f"stop,{tmp_path}")
    ranks = pids(tmp_path, 4)
    common = ["--nodes", "2", "--host", "127.0.0.1", "--port", str(free_port()), "--join-seconds", "5"]
    code, _, err = ended(launch("ok", *common, "--node-rank", "0"))
    assert (code, len(err)) == (2, 1)
    assert str(notes(tmp_path)) in err[0] and f"process {both[0].pid} on " in err[0]
    other = launch("ok", *common, "--node-rank", "1")
    time.sleep(1)
    other.send_signal(signal.SIGINT)
    assert ended(other)[0] == 1
    assert not (notes(tmp_path) / "stop").exists() and all(Path(f"/proc/{rank}").exists() for rank in ranks)
    both[0].send_signal(signal.SIGINT)
    assert [ended(process)[0] for process in both] == [75, 75]
    assert not notes(tmp_path).exists()


@pytest.mark.slow
def test_notes_of_a_killed_launcher_are_no_longer_read(
    launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    notes(tmp_path).mkdir(parents=True)
    for name, text in {"owner": "process 1 on nowhere", "stop": "", "retry.0": "2"}.items():
        (notes(tmp_path) / name).write_text(text)
    port = str(free_port())
    common = ["--nodes", "2", "--host", "127.0.0.1", "--port", port]
    late = launch("memory,2", *common, "--node-rank", "1")
    time.sleep(3)
    assert late.poll() is None
    results = [ended(process) for process in (launch("memory,2", *common, "--node-rank", "0"), late)]
    assert [code for code, _, _ in results] == [0, 0], "\n".join(line for _, _, err in results for line in err)
    assert [line.split()[5] for _, out, _ in results for line in out.splitlines()] == ["1", "2"]
    assert not notes(tmp_path).exists()


@pytest.mark.slow
def test_a_signal_to_one_node_stops_both(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    both = two_nodes(launch, f"stop,{tmp_path}")
    pids(tmp_path, 4)
    both[1].send_signal(signal.SIGTERM)
    assert [ended(process)[0] for process in both] == [75, 75]


@pytest.mark.slow
def test_a_node_that_never_comes(launch: Callable[..., subprocess.Popen[str]]) -> None:
    alone = ["--nodes", "2", "--host", "127.0.0.1", "--port", str(free_port()), "--join-seconds", "2"]
    for node in ("0", "1"):  # 0 waits for others, 1 too, as the address is this machine's
        code, _, err = ended(launch("ok", *alone, "--node-rank", node))
        assert code == 1
        assert err[-1].startswith("scale: error: 2 nodes did not meet at 127.0.0.1:")
