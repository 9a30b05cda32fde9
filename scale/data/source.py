"""The pretraining source: planned steps, read ahead by worker processes, resumable to the exact batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scale.data.feedback import by_piece, span_losses
from scale.data.packing import Row
from scale.data.planner import Plan, Planner
from scale.data.rows import RowReader, unstack
from scale.data.selection import LAG
from scale.data.workers import leave_signals_to_the_trainer, start_reading
from scale.errors import UsageError
from scale.protocols import Group, StepReport

_PREFETCH = 2
"""Groups that a worker reads ahead."""


@dataclass(frozen=True)
class _Planned:
    """What stays with the trainer of a plan that went to a worker: the planner's state right after it, and its rows if their
    losses will be heard."""

    state: dict[str, Any]
    rows: list[Row]


class _Blocks(Dataset[tuple[Plan, Tensor]]):
    """Map-style dataset whose index is a plan: what worker processes run. Gives this rank's rows as one block, and the
    plan without its rows, which would travel back for nothing."""

    def __init__(self, reader: RowReader, rank: int, world_size: int):
        self.reader, self.rank, self.world_size = reader, rank, world_size

    def __getitem__(self, plan: Plan) -> tuple[Plan, Tensor]:
        share = len(plan.rows) // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        block_4BL = self.reader.block(plan.rows[mine], plan.seq_len, plan.weights[mine])
        return replace(plan, rows=[], weights=[]), block_4BL


class PackedSource:
    """Implements `scale.protocols.Source` over tokenised documents.

    Workers only ever receive finished plans, so neither their number nor how far they run ahead changes a batch. A plan
    comes back with its number, by which it finds the planner's state right after it; the state of the last group *drawn* is
    what is saved, with the `fingerprint` of the data that it counts. Losses may be heard of any group that was drawn.

    With a selector in the planner the stepper tells each group's losses (`Group.hear`), which are put together with
    `all_sum` over the ranks; each rank then knows all. Raises UsageError for workers that would plan too far ahead.
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
        all_sum: Callable[[Tensor], Tensor] = lambda values: values,
    ):
        if planner.selector is not None:
            _check_selection(reader, workers)
        self.planner, self.seq_lens, self.all_sum = planner, seq_lens, all_sum
        self.names, self.micro_tokens = names, micro_tokens
        self.blocks = _Blocks(reader, rank, world_size)
        self.workers, self.fingerprint = workers, fingerprint
        self._state = planner.snapshot()
        self._ahead: dict[int, _Planned] = {}  # by number of the plan
        self._stream: list[Iterator[tuple[Plan, Tensor]]] = []  # at most one
        weakref.finalize(self, self._stream.clear)  # also at exit: workers end when their iterator goes

    def draw(self) -> Group:
        if not self._stream:
            loader = DataLoader(
                self.blocks,
                batch_size=None,
                sampler=_plans(self.planner, self._ahead),
                num_workers=self.workers,
                prefetch_factor=_PREFETCH if self.workers else None,
                collate_fn=_as_is,
                worker_init_fn=leave_signals_to_the_trainer(),
                generator=torch.Generator().manual_seed(0),  # the default would draw from the global RNG
            )
            self._stream.append(start_reading(loader))
        plan, block_4BL = next(self._stream[0])
        planned = self._ahead.pop(plan.number)
        self._state = planned.state
        group = self._group(plan, block_4BL)
        if self.planner.selector is not None:
            group.hear = partial(self._hear, plan.number, planned.rows, block_4BL)
        return group

    def _group(self, plan: Plan, block_4BL: Tensor) -> Group:
        size = self.micro_tokens // plan.seq_len
        return Group(
            batches=[unstack(block_4BL[:, i : i + size]) for i in range(0, block_4BL.shape[1], size)],
            tokens=plan.tokens,
            seq_len=plan.seq_len,
            sources=dict(zip(self.names, plan.drawn, strict=True)),
        )

    def _hear(self, number: int, rows: list[Row], block_4BL: Tensor, sums: Sequence[Tensor]) -> None:
        """Loss sums (b, S) of the micro-batches of a group, by its number, go to the selector. Collective."""
        named = unstack(block_4BL)
        values_N2 = span_losses(
            rows, self.blocks.rank, self.blocks.world_size, named["targets"], named["segment_ids"], sums, self.all_sum
        )
        pieces_N = self.planner.pieces([span for row in rows for span in row])
        assert self.planner.selector is not None
        self.planner.selector.hear(number, *by_piece(pieces_N, values_N2))

    def passed_over(self) -> dict[str, dict[str, int]]:
        """Pieces and positions left out by the selector so far, of each source; whole windows count when they open."""
        taken, kept, pieces = (self._state.get(name, ()) for name in ("taken", "kept", "passed_over"))
        return {
            name: {"documents": n, "tokens": all_ - chosen}
            for name, all_, chosen, n in zip(self.names, taken, kept, pieces, strict=False)
        }

    def selection(self) -> dict[str, int]:
        """What selecting documents spared and cost so far, over all sources; nothing where all are trained on."""
        if self.planner.selector is None:
            return {}
        passed, probed = self.passed_over().values(), self.planner.selector.probed
        return {
            "documents_skipped": sum(one["documents"] for one in passed),
            "tokens_skipped": sum(one["tokens"] for one in passed),
            "probe_forwards": probed["forwards"],
            "probe_tokens": probed["tokens"],
        }

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
            plan = throwaway.next()
            if self.planner.selector is not None and self.planner.selector.unbiased:
                plan = replace(plan, weights=[[1.0] * len(row) for row in plan.rows])
            batches.append(self._group(*self.blocks[plan]).batches[0])
        return Group(batches=batches, tokens=0)

    def observe(self, report: StepReport) -> None:
        """Nothing to learn from a step: the curriculum follows the groups drawn."""

    def publish(self, version: int, params: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """No rollout engine listens."""

    def state_dict(self) -> dict[str, Any]:
        state = {"data": self.fingerprint, "planner": self._state}
        if self.planner.selector is not None:
            state["selection"] = self.planner.selector.state_dict(self._state["groups"] - 1)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UsageError if the state belongs to other data: documents are counted, so it would point at others."""
        if state.get("data") != self.fingerprint:
            raise UsageError(
                "data.sources: the data or the tokenizer changed since the checkpoint was written; restore the files "
                "as they were, or start a new run with another name"
            )
        if ("selection" in state) != (self.planner.selector is not None):
            raise UsageError(
                "predict.selection.kind: was 'off' on one side of the checkpoint and on at the other; go on as the run began"
            )
        self.planner.restore(state["planner"])
        if self.planner.selector is not None:
            self.planner.selector.load_state_dict(state["selection"])
        self._state = self.planner.snapshot()
        self._ahead.clear()
        self._stream.clear()


def _plans(planner: Planner, ahead: dict[int, _Planned]) -> Iterator[Plan]:
    """Plans in order; `ahead` receives what stays here of each. No reference to the source, which may thus die."""
    while True:
        plan = planner.next()
        ahead[plan.number] = _Planned(planner.snapshot(), plan.rows if planner.selector is not None else [])
        yield plan


def _check_selection(reader: RowReader, workers: int) -> None:
    """Raises UsageError where pieces cannot be told apart, or plans would be made before what they see was heard."""
    if reader.cross_documents:
        raise UsageError("data.cross_documents = true: selection has no documents to tell apart (set it to false)")
    if _PREFETCH * workers + 1 > LAG:
        most = (LAG - 1) // _PREFETCH
        raise UsageError(f"data.workers = {workers}: selection hears too late of what they read ahead (at most {most})")


def _as_is(item: Any) -> Any:
    return item
