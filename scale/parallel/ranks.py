"""The processes of one run: who is here, and how they agree. One process alone needs no process group."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scale.errors import Elsewhere, LostRank, ScaleError, UsageError

T = TypeVar("T")

RENDEZVOUS_SECONDS = 50
"""How long to wait for the other ranks to appear; a dead rendezvous must show within a minute."""
FIRST_STEP_SECONDS = 1800
"""How long a collective may take before the end of the first step: data are prepared, models compiled."""
FAIL_TOGETHER_SECONDS = 3
"""How long after the first rank others may fail over the same mistake without a message of their own."""
_BESIDE = "beside"


class Ranks:
    """All processes of a run as seen by one of them. With `world_size` 1 nothing is ever exchanged.

    What it exchanges beside tensors is JSON, never pickles. Every method but `rank == 0` questions is collective: each
    rank must call it, in the same order.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        device: str | torch.device = "cpu",
        group: dist.ProcessGroup | None = None,
    ):
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.device, self.group = torch.device(device), group

    def beside(self) -> Ranks:
        """The same ranks with a channel of their own, for a background thread: exchanges do not get in each other's way."""
        if self.world_size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=FIRST_STEP_SECONDS), group_desc=_BESIDE)
        return Ranks(self.rank, self.world_size, self.local_rank, self.device, group)

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, the same bits on each."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return flag if self.world_size == 1 else bool(self.all_sum(torch.tensor(int(flag))))

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        raw = _to_bytes(value)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([raw.numel()]), group=self.group)
        longest = int(max(sizes))
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, torch.nn.functional.pad(raw, (0, longest - raw.numel())), group=self.group)
        return [_from_bytes(text[: int(size)]) for text, size in zip(texts, sizes, strict=True)]

    def barrier(self) -> None:
        """Return when every rank is here."""
        self.any(False)

    def each(self, run: Callable[[], T]) -> T:
        """Run on every rank. If it fails with a ScaleError anywhere, every rank raises: the first that failed its own
        error, the others `Elsewhere`, which is not printed."""
        if self.world_size == 1:
            return run()
        result: T | None = None
        mine: ScaleError | None = None
        try:
            result = run()
        except ScaleError as error:
            mine = error
        problems = self.gather(None if mine is None else [mine.exit_code, str(mine)])
        first = next((rank for rank, problem in enumerate(problems) if problem is not None), None)
        if first is None:
            return result  # type: ignore[return-value]
        if first == self.rank:
            assert mine is not None
            mine.shared = all(problem == problems[first] for problem in problems)
            raise mine
        raise Elsewhere(f"rank {first}: {problems[first][1]}", problems[first][0])

    def lead(self, run: Callable[[], Any]) -> Any:
        """Run on rank 0 while the others wait; its JSON result on every rank. Errors as in `each`."""
        if self.world_size == 1:
            return run()
        answer: list[Any] = []
        self.each(lambda: answer.append(run()) if self.rank == 0 else None)
        raw = _to_bytes(answer[0]) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([raw.numel()])
        dist.broadcast(size, 0, group=self.group)
        text = raw if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(text, 0, group=self.group)
        return _from_bytes(text)

    def place(self, device: str) -> None:
        """Take a device of this machine: the GPU of its own, where it is cuda. Raises UsageError if there is none."""
        self.device = _device(device, self.local_rank)

    def need_group(self) -> None:
        """Make a process group of one where there is none: sharding strategies want one also for a single process."""
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                store=dist.HashStore(),
                rank=0,
                world_size=1,
            )

    def set_timeout(self, seconds: int) -> None:
        """From now on a collective that takes longer than this fails: a rank is dead or hangs. Holds for every process
        group that exists, also those of meshes and of DeepSpeed, but not for channels made by `beside`."""
        if self.world_size > 1:
            from torch.distributed.distributed_c10d import _set_pg_timeout, _world

            for group in _world.pg_map:
                if group.group_desc != _BESIDE and dist.get_backend(group) != "fake":  # a plan's ranks never wait
                    _set_pg_timeout(timedelta(seconds=seconds), group)


def _to_bytes(value: Any) -> Tensor:
    """A JSON value as (bytes,) uint8."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())


def join(device: str | None = "auto") -> Ranks:
    """This process among those that torchrun (or Slurm, or Ray) started: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
    MASTER_PORT in the environment. Alone without them. With `device` None the ranks are told their place later.

    Raises UsageError for an unusable environment or a missing device, ScaleError if the others do not appear in time.
    """
    world_size, rank, local_rank = (_number(name, unset) for name, unset in _VARIABLES.items())
    place = torch.device("cpu") if device is None else _device(device, local_rank)
    if world_size == 1:
        return Ranks(device=place)
    if rank >= world_size:
        raise UsageError(f"RANK = {rank} in the environment: expected less than WORLD_SIZE = {world_size}")
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or not os.environ["MASTER_PORT"].isdigit():
        what = f"not {', '.join(missing)}" if missing else f"MASTER_PORT = {os.environ['MASTER_PORT']!r} is no port"
        raise UsageError(
            f"WORLD_SIZE = {world_size} in the environment, but {what} (start ranks with launch/torchrun.sh)"
        )
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=RENDEZVOUS_SECONDS),
        )
        dist.all_reduce(torch.zeros(1))  # connects every pair of ranks now, not somewhere later
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ScaleError(
            f"the {world_size} ranks did not meet at MASTER_ADDR:MASTER_PORT = {address} within {RENDEZVOUS_SECONDS} s "
            f"(are all of them started, and is the address reachable?): {reason}"
        ) from None
    ranks = Ranks(rank, world_size, local_rank, place)
    ranks.set_timeout(FIRST_STEP_SECONDS)
    return ranks


def first_to_fail(text: str) -> bool:
    """Whether no other rank has failed before this one; where it has, its error is the one to show."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=5))
        mine = f"{dist.get_rank()} {text}"
        first = bool(store.compare_set("scale/first_error", "", mine).decode() == mine)
        _let_others_ask(store)
        return first
    except (RuntimeError, OSError):
        return True  # the store went with the rank that kept it


def _let_others_ask(store: dist.Store) -> None:
    """Rank 0 may keep the store: it stays until all others have failed too, or for as long as they may need to."""
    asked = store.add("scale/asked", 1)
    deadline = time.monotonic() + FAIL_TOGETHER_SECONDS
    while dist.get_rank() == 0 and asked < dist.get_world_size() and time.monotonic() < deadline:
        time.sleep(0.02)
        asked = store.add("scale/asked", 0)


def leave() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def lost_peers_in_one_line() -> Iterator[None]:
    """A collective that fails because another rank is gone or stuck raises LostRank instead of pages of C++."""
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_initialized() and is_lost_peer(error)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise LostRank(f"lost contact with another rank, whose own message says why: {reason}") from None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or stuck."""
    if isinstance(error, dist.DistError):
        return True
    words = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "connection refused", "gloo")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


_VARIABLES = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}


def _number(name: str, unset: int) -> int:
    text = os.environ.get(name, str(unset))
    if not text.isdigit() or (name == "WORLD_SIZE" and int(text) < 1):
        raise UsageError(
            f"{name} = {text!r} in the environment: expected a number (start ranks with launch/torchrun.sh)"
        )
    return int(text)


def _device(asked: str, local_rank: int) -> torch.device:
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if asked != "auto" and asked != "cuda":
        return torch.device(asked)
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UsageError(
            f"compute.device = {asked!r}: LOCAL_RANK is {local_rank}, but this machine shows {count} GPUs to torch "
            "(NCCL needs one for each rank: start fewer ranks, or use compute.device=cpu)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
