"""The pretraining source: planned steps, read ahead by worker processes, resumable to the exact batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scale.data.planner import Plan, Planner
from scale.data.rows import RowReader
from scale.protocols import Group, StepReport


class _Groups(Dataset[Group]):
    """Map-style dataset whose index is a plan: what worker processes run."""

    def __init__(self, reader: RowReader, names: Sequence[str], micro_tokens: int, rank: int, world_size: int):
        self.reader, self.names, self.micro_tokens = reader, names, micro_tokens
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, plan: Plan) -> Group:
        share = len(plan.rows) // self.world_size
        rows = plan.rows[self.rank * share : (self.rank + 1) * share]
        size = self.micro_tokens // plan.seq_len
        return Group(
            batches=[self.reader.batch(rows[i : i + size], plan.seq_len) for i in range(0, len(rows), size)],
            tokens=sum(span.length for row in plan.rows for span in row),
            seq_len=plan.seq_len,
            sources=dict(zip(self.names, plan.drawn, strict=True)),
        )


class PackedSource:
    """Implements `scale.protocols.Source` over tokenised documents.

    Workers only ever receive finished plans, so neither their number nor how far they run ahead changes a batch. Every
    plan is paired with the planner's state right after it; the state of the last group *drawn* is what is saved.
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
    ):
        self.planner, self.seq_lens = planner, seq_lens
        self.groups = _Groups(reader, names, micro_tokens, rank, world_size)
        self.workers = workers
        self._state = planner.snapshot()
        self._ahead: deque[dict[str, Any]] = deque()
        self._stream: Iterator[Group] | None = None

    def _plans(self) -> Iterator[Plan]:
        while True:
            plan = self.planner.next()
            self._ahead.append(self.planner.snapshot())
            yield plan

    def draw(self) -> Group:
        if self._stream is None:
            loader = DataLoader(
                self.groups,
                batch_size=None,
                sampler=self._plans(),
                num_workers=self.workers,
                prefetch_factor=2 if self.workers else None,
                collate_fn=_as_is,  # type: ignore[arg-type]  # torch expects a list here
                generator=torch.Generator().manual_seed(0),  # the default would draw from the global RNG
            )
            self._stream = iter(loader)
        group = next(self._stream)
        self._state = self._ahead.popleft()
        return group

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
            )
            batches.append(self.groups[throwaway.next()].batches[0])
        return Group(batches=batches, tokens=0)

    def observe(self, report: StepReport) -> None:
        """Nothing to learn from a step: the curriculum follows the groups drawn."""

    def publish(self, version: int, params: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """No rollout engine listens."""

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.planner.restore(state)
        self._state = self.planner.snapshot()
        self._ahead.clear()
        self._stream = None


def _as_is(group: Group) -> Group:
    return group
