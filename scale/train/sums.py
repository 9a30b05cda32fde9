"""Sums over the micro-batches and ranks of a group: the one place where they become means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scale.errors import ScaleError
from scale.hardware import sum_dtype
from scale.parallel.ranks import Ranks
from scale.protocols import Batch, Loss, Objective, Term

Read = Callable[[], tuple[list[float], dict[str, list[float]]]]
"""Gives numbers that stand first and rows by name, summed over ranks."""


class NothingToLearn(Exception):
    """Every term of a group counts zero: its message says which."""


class NamedSums:
    """Sums over ranks of rows of `width` numbers that have names.

    A rank may lack a name that another has, and may have its own in any order. The names of all ranks are gathered when one
    of them has a new one, which every exchange tells: as a rule each step exchanges as many numbers as the one before.
    """

    def __init__(self, ranks: Ranks, width: int):
        self.ranks, self.width = ranks, width
        self.names: list[str] = []

    def add_up(self, first: Tensor, rows: Mapping[str, Tensor]) -> Read:
        """Exchange `first` (as long on every rank) and the rows, without waiting for the device; what is returned waits.
        Both are collective, and nothing else may be added up between them."""
        if self.ranks.world_size == 1:
            self.names = sorted(rows)
        values = self._exchange(first, rows)

        def read() -> tuple[list[float], dict[str, list[float]]]:
            found = values.tolist()
            if found.pop():
                self.names = sorted({*self.names, *(name for names in self.ranks.gather(list(rows)) for name in names)})
                found = self._exchange(first, rows).tolist()[:-1]
            at = [len(first) + i * self.width for i in range(len(self.names))]
            return found[: len(first)], {
                name: found[i : i + self.width] for name, i in zip(self.names, at, strict=True)
            }

        return read

    def _exchange(self, first: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        nothing = first.new_zeros(self.width)
        is_new = first.new_full((1,), float(not rows.keys() <= set(self.names)))
        return self.ranks.all_sum(torch.cat([first, *(rows.get(name, nothing) for name in self.names), is_new]))


class Counts:
    """Counts of the terms of an objective, over all micro-batches and ranks."""

    def __init__(self, ranks: Ranks, objective: Objective):
        self.ranks, self.objective = ranks, objective
        self.sums = NamedSums(ranks, 1)

    def of(self, batches: Sequence[Batch]) -> Counted:
        """Known before any forward pass. Raises NothingToLearn if all are zero, ScaleError for what is no count. Collective."""
        dtype = sum_dtype(self.ranks.device)
        local: dict[str, Tensor] = {}
        for batch in batches:
            for name, count in self.objective.counts(batch).items():
                one = torch.as_tensor(count).detach().reshape(1).cpu().to(dtype)
                local[name] = local[name] + one if name in local else one
        without_batch = torch.full((1,), float(not batches), dtype=dtype)
        (missing,), rows = self.sums.add_up(without_batch, local)()
        counts = {name: value for name, (value,) in rows.items()}
        for name, value in counts.items():
            if not (math.isfinite(value) and value >= 0):
                raise ScaleError(f"objective: counts() gives {value:g} for {name!r}: expected a number of 0 or more")
        if not any(counts.values()):
            raise NothingToLearn(
                f"{', '.join(counts)} count 0 (are all labels masked?)" if counts else "no batch, or no term"
            )
        if missing:
            raise ScaleError(
                f"source: {missing:g} of {self.ranks.world_size} ranks drew no micro-batch, but the others did: every rank "
                "needs as many, as their forward passes meet"
            )
        return Counted(counts, dict.fromkeys(counts, torch.zeros((), dtype=dtype, device=self.ranks.device)))


@dataclass
class Counted:
    """Counts of a group over all ranks by term, and what the terms of this rank's micro-batches themselves count so far."""

    counts: dict[str, float]
    own: dict[str, Tensor]

    def loss(self, out: Loss) -> Tensor:
        """This micro-batch's part of the global mean loss: each term divided by its global count. Raises ScaleError for a
        term that counts() does not name."""
        unknown = sorted(out.terms.keys() - self.counts.keys())
        if unknown:
            raise ScaleError(
                f"objective: its loss has the term {unknown[0]!r}, but counts() gives only {', '.join(self.counts)}"
            )
        parts = []
        for name in sorted(out.terms):
            term = out.terms[name]
            parts.append(term.weight * term.total / (self.counts[name] or 1.0))
            self.own[name] = self.own[name] + _number(term.count, self.own[name])
        return sum_of(parts)

    def check(self, own: Sequence[float]) -> None:
        """`own`: what the terms counted, over all ranks, in the order of `counts`. Raises ScaleError where the two differ by
        more than rounding: the loss was divided by a wrong number."""
        for (name, count), theirs in zip(self.counts.items(), own, strict=True):
            if not math.isclose(count, theirs, rel_tol=1e-5):
                raise ScaleError(
                    f"objective: counts() gives {count:,.10g} for {name!r}, its terms count {theirs:,.10g}: they must be "
                    "equal, as the loss is divided by the former"
                )


@dataclass
class GroupSums:
    """Loss and metrics of a group over all ranks, on the device until they are read."""

    read_all: Read
    counted: Counted
    passes: int
    segments: list[Tensor]
    _read: tuple[float, dict[str, float]] | None = field(default=None, repr=False)

    def read(self) -> tuple[float, dict[str, float]]:
        """Loss, and the mean of each metric that counts something. Waits for the device and exchanges, the first time only.
        Raises ScaleError for terms that count otherwise than was said. Collective."""
        if self._read is None:
            (loss, *own), rows = self.read_all()
            self.counted.check(own)
            self._read = loss, {name: total / count for name, (total, count) in rows.items() if count}
        return self._read


class Gathered:
    """Adds up what the forward passes of one group say."""

    def __init__(self, counted: Counted, device: torch.device):
        self.counted = counted
        self.total = torch.zeros((), dtype=sum_dtype(device), device=device)
        self.metrics: dict[str, Tensor] = {}

    def add(self, loss: Tensor, metrics: Mapping[str, Term]) -> None:
        """Of one micro-batch."""
        self.total += loss.detach()
        for name, term in metrics.items():
            pair = torch.stack([_number(term.total, self.total), _number(term.count, self.total)])
            self.metrics[name] = self.metrics[name] + pair if name in self.metrics else pair

    def over_ranks(self, names: NamedSums) -> Read:
        """Loss, the terms' own counts and metrics; collective."""
        return names.add_up(torch.stack([self.total, *self.counted.own.values()]), self.metrics)


def sum_of(tensors: Any) -> Tensor:
    """Sum of an iterable of tensors (Python's `sum` starts with the int 0)."""
    return torch.stack(list(tensors)).sum(0)


def _number(value: Tensor | float, like: Tensor) -> Tensor:
    """Without gradient, of the type and on the device of another number."""
    return torch.as_tensor(value).detach().reshape(()).to(like)
