"""The pretraining source: planned steps, read ahead by worker processes, resumable to the exact batch."""

from __future__ import annotations

import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scale.data.planner import Plan, Planner
from scale.data.rows import RowReader, unstack
from scale.errors import UsageError
from scale.protocols import Group, StepReport


class _Blocks(Dataset[tuple[Plan, Tensor]]):
    """Map-style dataset whose index is a plan: what worker processes run. Gives this rank's rows as one block, and the
    plan without its rows, which would travel back for nothing."""

    def __init__(self, reader: RowReader, rank: int, world_size: int):
        self.reader, self.rank, self.world_size = reader, rank, world_size

    def __getitem__(self, plan: Plan) -> tuple[Plan, Tensor]:
        share = len(plan.rows) // self.world_size
        return replace(plan, rows=[]), self.reader.block(
            plan.rows[self.rank * share : (self.rank + 1) * share], plan.seq_len
        )


class PackedSource:
    """Implements `scale.protocols.Source` over tokenised documents.

    Workers only ever receive finished plans, so neither their number nor how far they run ahead changes a batch. Every
    plan is paired with the planner's state right after it; the state of the last group *drawn* is what is saved, with the
    `fingerprint` of the data that it counts.
    """

    def __init__(
        self,
        planner: Planner,
        reader: RowReader,
        names: Sequence[str],
        micro_tokens: int,
        seq_lens: Sequence[int],
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        fingerprint: str = "",
    ):
        self.planner, self.seq_lens = planner, seq_lens
        self.names, self.micro_tokens = names, micro_tokens
        self.blocks = _Blocks(reader, rank, world_size)
        self.workers, self.fingerprint = workers, fingerprint
        self._state = planner.snapshot()
        self._ahead: deque[dict[str, Any]] = deque()
        self._stream: list[Iterator[tuple[Plan, Tensor]]] = []  # at most one
        weakref.finalize(self, self._stream.clear)  # also at exit: workers end when their iterator goes

    def draw(self) -> Group:
        if not self._stream:
            loader = DataLoader(
                self.blocks,
                batch_size=None,
                sampler=_plans(self.planner, self._ahead),
                num_workers=self.workers,
                prefetch_factor=2 if self.workers else None,
                collate_fn=_as_is,
                worker_init_fn=_leave_signals_to_the_trainer,
                generator=torch.Generator().manual_seed(0),  # the default would draw from the global RNG
            )
            self._stream.append(iter(loader))
        plan, block_4BL = next(self._stream[0])
        self._state = self._ahead.popleft()
        return self._group(plan, block_4BL)

    def _group(self, plan: Plan, block_4BL: Tensor) -> Group:
        size = self.micro_tokens // plan.seq_len
        return Group(
            batches=[unstack(block_4BL[:, i : i + size]) for i in range(0, block_4BL.shape[1], size)],
            tokens=plan.tokens,
            seq_len=plan.seq_len,
            sources=dict(zip(self.names, plan.drawn, strict=True)),
        )

    def rehearse(self) -> Group:
        """The first micro-batch of each row length still to come, read through a throw-away planner."""
        current = self.planner.seq_len_of(self._state["groups"])
        batches = []
        for seq_len in (n for n in self.seq_lens if n >= current):
            throwaway = Planner(
                self.planner.lengths,
                self.planner.weights,
                self.planner.tokens_per_step,
                lambda _, n=seq_len: n,  # type: ignore[misc]
                self.planner.longest,
            )
            batches.append(self._group(*self.blocks[throwaway.next()]).batches[0])
        return Group(batches=batches, tokens=0)

    def observe(self, report: StepReport) -> None:
        """Nothing to learn from a step: the curriculum follows the groups drawn."""

    def publish(self, version: int, params: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """No rollout engine listens."""

    def state_dict(self) -> dict[str, Any]:
        return {"data": self.fingerprint, "planner": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UsageError if the state belongs to other data: documents are counted, so it would point at others."""
        if state.get("data") != self.fingerprint:
            raise UsageError(
                "data.sources: the data or the tokenizer changed since the checkpoint was written; restore the files "
                "as they were, or start a new run with another name"
            )
        self.planner.restore(state["planner"])
        self._state = self.planner.snapshot()
        self._ahead.clear()
        self._stream.clear()


def _plans(planner: Planner, ahead: deque[dict[str, Any]]) -> Iterator[Plan]:
    """Plans in order; `ahead` receives the planner's state after each. No reference to the source, which may thus die."""
    while True:
        plan = planner.next()
        ahead.append(planner.snapshot())
        yield plan


def _as_is(item: Any) -> Any:
    return item


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A cluster signals every process of a job; a worker that died of it would take the checkpoint with it.

    The second SIGTERM does end a worker: so DataLoader can still get rid of one that hangs.
    """

    def once(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, once)
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
