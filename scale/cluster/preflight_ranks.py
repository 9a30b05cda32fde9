"""The preflight in one rank: reports go to a store, then collectives; rank 0 judges. Nothing waits without a deadline."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from scale.cluster.loopback import ADDRESS, serve_store
from scale.cluster.node_report import remove_token, report, write_token
from scale.cluster.verdict import Findings, own_problems, table, together_problems

COLLECT_SHARE = 0.5
"""Part of the time after which a rank that has not reported counts as missing."""
BEAT_SECONDS = 0.5
SILENT_SECONDS = 5.0
"""Without a sign of life for so long, a rank hangs."""
REPEATS = 5


@dataclass(frozen=True)
class Setup:
    """Who this rank is and what it is asked to do."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int
    folder: Path
    gpus: bool
    megabytes: int
    min_gbps: float
    deadline: float
    """On this machine's monotonic clock, like `start`."""
    start: float
    agent_store: bool
    """torchrun serves the store at this port already."""

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def check(setup: Setup) -> int:
    """Take part. Returns the exit code; rank 0 prints."""
    threading.Thread(target=_end_at, args=(setup,), daemon=True).start()
    try:
        store = _connect(setup, serve=setup.rank == 0 and not setup.agent_store)
    except (dist.DistError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        print(f"preflight: rank {setup.rank}: no rank 0 at {setup.host}:{setup.port}: {reason}", flush=True)
        return 1
    if setup.rank == 0:
        return _lead(setup, store)
    return _follow(setup, store)


def _end_at(setup: Setup) -> None:
    """Ends the process whatever its main thread waits for."""
    time.sleep(max(0.0, setup.left()))
    print(f"preflight: rank {setup.rank}: no verdict in time (rank 0 or the network hangs)", flush=True)
    os._exit(1)


def _connect(setup: Setup, serve: bool) -> dist.Store:
    """Raises OSError or DistError if nobody serves there in time."""
    wait = timedelta(seconds=max(1.0, setup.left() * 0.9))
    if serve and setup.host == ADDRESS:
        return dist.PrefixStore("preflight", serve_store(setup.port, wait))
    if not serve:
        _wait_for_server(setup)
    store = dist.TCPStore(setup.host, setup.port, is_master=serve, timeout=wait, wait_for_workers=False)
    return dist.PrefixStore("preflight", store)


def _wait_for_server(setup: Setup) -> None:
    """torch's own retries get so far apart that a late server is missed."""
    while True:
        try:
            socket.create_connection((setup.host, setup.port), timeout=2).close()
            return
        except OSError:
            if setup.left() < 2:
                raise
            time.sleep(0.2)


def _follow(setup: Setup, store: dist.Store) -> int:
    token = json.loads(store.get("token"))
    _publish(setup, store, token)
    if json.loads(store.get("go")):
        _collectives(setup, store)
    _beat_until(setup, store, lambda: store.check(["verdict"]))
    code = int(store.get("verdict"))
    store.set(f"left/{setup.rank}", "1")
    return code


def _publish(setup: Setup, store: dist.Store, token: str | None) -> None:
    store.set(f"clock/{setup.rank}", repr(time.time()))
    found = report(setup.rank, setup.local_rank, setup.folder, token, setup.gpus)
    store.set(f"report/{setup.rank}", json.dumps(found))


def _lead(setup: Setup, store: dist.Store) -> int:
    token = secrets.token_hex(8)
    written = write_token(setup.folder, token) is None
    found = Findings(setup.world_size)
    try:
        store.set("token", json.dumps(token if written else None))
        _publish(setup, store, None)
        _collect(setup, store, found)
    finally:
        remove_token(setup.folder, token)
    found.tried = len(found.reports) == setup.world_size > 1 and not any(
        "problem" in (entry["gpu"] or {}) for entry in found.reports.values()
    )
    store.set("go", json.dumps(found.tried))
    if found.tried:
        worker = _collectives(setup, store)
        _watch(setup, store, found, worker)
    problems = own_problems(found) + together_problems(found, setup.min_gbps)
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table(found, problems))
    for name, speed in found.speeds.items():
        print(f"preflight: {name} {speed:.2f} GB/s ({setup.megabytes} MiB, {setup.world_size} ranks)")
    for problem in problems:
        print(f"preflight: {problem.line()}")
    print(f"preflight: {'not ready' if problems else f'{setup.world_size} ranks ready'}", flush=True)
    store.set("verdict", str(int(bool(problems))))
    _let_go(setup, store, found)
    return int(bool(problems))


def _collect(setup: Setup, store: dist.Store, found: Findings) -> None:
    """Read reports as they come, until all are here or time is up."""
    until = setup.start + COLLECT_SHARE * (setup.deadline - setup.start)
    while len(found.reports) < setup.world_size and time.monotonic() < until:
        for rank in range(setup.world_size):
            if rank not in found.offsets and store.check([f"clock/{rank}"]):
                found.offsets[rank] = float(store.get(f"clock/{rank}")) - time.time()
            if rank not in found.reports and store.check([f"report/{rank}"]):
                found.reports[rank] = json.loads(store.get(f"report/{rank}"))
        time.sleep(0.05)


def _collectives(setup: Setup, store: dist.Store) -> threading.Thread:
    """Exchange tensors in a thread, on a connection of its own, so that this one can show that the rank is alive."""

    def work() -> None:
        stage = "joining"
        try:
            store_of_work = _connect(setup, serve=False)
            for stage, run in _stages(setup, store_of_work):
                store.set(f"stage/{setup.rank}", stage)
                run()
            store.set(f"stage/{setup.rank}", "done")
        except (RuntimeError, ValueError, OSError) as error:
            with suppress(RuntimeError):
                store.set(f"stage/{setup.rank}", f"{stage}:{' '.join(str(error).split())[:120]}")

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    if setup.rank != 0:
        _beat_until(setup, store, lambda: not worker.is_alive() or store.check(["verdict"]))
    return worker


def _stages(setup: Setup, store: dist.Store) -> list[tuple[str, Callable[[], None]]]:
    device = torch.device("cuda", setup.local_rank) if setup.gpus else torch.device("cpu")
    count = setup.megabytes * 2**20 // 4
    wait = timedelta(seconds=max(1.0, setup.left() * 0.9))

    def join() -> None:
        if setup.gpus:
            torch.cuda.set_device(device)
        backend = "nccl" if setup.gpus else "gloo"
        group = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=setup.rank, world_size=setup.world_size, timeout=wait)

    def measure(name: str, run: Callable[[], Any], moved: float) -> None:
        run()
        seconds = [_seconds(run, device) for _ in range(REPEATS)]
        store.set(f"speed/{name}/{setup.rank}", repr(moved / min(seconds) / 1e9))

    def all_reduce() -> None:  # bus bandwidth as nccl-tests define it
        values = torch.ones(count, device=device)
        measure(
            "all_reduce", lambda: dist.all_reduce(values), 2 * (setup.world_size - 1) / setup.world_size * count * 4
        )

    def all_gather() -> None:
        part = torch.ones(count // setup.world_size, device=device)
        parts = [torch.empty_like(part) for _ in range(setup.world_size)]
        moved = (setup.world_size - 1) * part.numel() * 4
        measure("all_gather", lambda: dist.all_gather(parts, part), moved)

    return [("joining", join), ("all_reduce", all_reduce), ("all_gather", all_gather)]


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _beat_until(setup: Setup, store: dist.Store, done: Callable[[], bool]) -> None:
    count = 0
    while not done():
        count += 1
        store.set(f"beat/{setup.rank}", str(count))
        time.sleep(BEAT_SECONDS)


def _watch(setup: Setup, store: dist.Store, found: Findings, worker: threading.Thread) -> None:
    """Until all ranks are done, one failed or is silent, or time is up (but for the time to say so)."""
    seen: dict[int, tuple[bytes, float]] = {}
    others = range(1, setup.world_size)
    while setup.left() > 3:
        for rank in range(setup.world_size):
            if store.check([f"stage/{rank}"]):
                found.stages[rank] = store.get(f"stage/{rank}").decode()
        if len(found.stages) == setup.world_size and all(stage == "done" for stage in found.stages.values()):
            for name in ("all_reduce", "all_gather"):
                speeds = [float(store.get(f"speed/{name}/{rank}")) for rank in range(setup.world_size)]
                found.speeds[name] = min(speeds)
            return
        now = time.monotonic()
        for rank in others:
            beat = store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b""
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = (beat, now)
        found.silent = {rank for rank in others if now - seen[rank][1] > SILENT_SECONDS}
        if found.silent:
            return
        time.sleep(0.1)


def _let_go(setup: Setup, store: dist.Store, found: Findings) -> None:
    """The store lives in this process: wait a moment until the others have read the verdict."""
    until = min(time.monotonic() + 2, setup.deadline)
    waiting = set(found.reports) - found.silent - {0}
    while waiting and time.monotonic() < until:
        waiting = {rank for rank in waiting if not store.check([f"left/{rank}"])}
        time.sleep(0.05)
