"""Selection put together: what was heard when, what a window may know of it, and what is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from scale.config.predict import SelectionConfig
from scale.data.packing import Span
from scale.data.selection import LAG
from scale.errors import ScaleError, UsageError
from scale.parallel.ranks import Ranks
from scale.predict.packing import pack_array, unpack_array
from scale.predict.selection.foresight import Foreseen, Foresight, Remembered
from scale.predict.selection.history import Passages

FORESIGHTS: dict[str, type[Remembered] | type[Foreseen]] = {"history": Remembered, "regression": Foreseen}


class Probed(NamedTuple):
    """Real losses of some spans: mean over the learned tokens (nan where there is none), and what they cost."""

    losses_N: np.ndarray
    forwards: int
    tokens: int


Probe = Callable[[Sequence[Span]], Probed]
"""Forward passes over spans, the same answer on every rank. Collective."""


class _Heard(NamedTuple):
    group: int
    pieces_N: np.ndarray
    losses_N: np.ndarray


@dataclass
class _View:
    """A foresight that has learned all that was heard up to group `until`."""

    foresight: Foresight
    until: int = -LAG - 1

    def advance(self, heard: Sequence[_Heard], until: int) -> None:
        for one in heard:
            if self.until < one.group <= until:
                self.foresight.learn(*one)
        self.until = max(self.until, until)


class LossSelector:
    """Implements `scale.data.selection.Selector` by remembered or foreseen losses of the pieces of `passages`.

    Plans are made ahead of training, so there are two views of the same past: what the newest window knows, and what is
    saved, which stands where the last group drawn stands. Losses that a view must not know yet wait in `heard`. `lead` gives
    rank 0's values to all ranks. `probe` is set by who owns the model, before the first draw.

    A score is the expected loss and one standard deviation (optimism in the face of uncertainty; Auer, "Using Confidence
    Bounds for Exploitation-Exploration Trade-offs", JMLR 2002): a piece that is left out is not heard of again, so what
    is believed of it would never be corrected, also when the model has forgotten it.
    """

    def __init__(
        self,
        config: SelectionConfig,
        passages: Passages,
        lead: Callable[[np.ndarray], np.ndarray] = lambda values: values,
    ):
        self.unbiased, self.share = config.unbiased, config.probe
        self.kept, self.warmup = config.keep, config.warmup
        make = FORESIGHTS[config.kind]
        self.planning, self.saved = (_View(make(passages, config.memory)) for _ in range(2))
        self.lead = lead
        self.heard: list[_Heard] = []
        self.probe: Probe | None = None
        self.probed = {"documents": 0, "tokens": 0, "forwards": 0}

    def keep(self, group: int) -> float:
        return self.kept if group >= self.warmup else 1.0

    def scores(self, group: int, spans: Sequence[Span], pieces_N: np.ndarray) -> np.ndarray:
        self.planning.advance(self.heard, group - LAG)
        expected_N, unsure_N = (self.lead(values_N) for values_N in self.planning.foresight.scores(group, pieces_N))
        score_N = expected_N + unsure_N
        most = int(self.share * len(spans))
        if most:
            at = np.sort(np.argsort(-unsure_N, kind="stable")[:most])
            score_N[at] = self._measured(group, [spans[i] for i in at], pieces_N[at], score_N[at])
        return score_N

    def _measured(self, group: int, spans: Sequence[Span], pieces_N: np.ndarray, instead_N: np.ndarray) -> np.ndarray:
        """Losses by forward passes, which are remembered as well; `instead_N` where no token is learned."""
        if self.probe is None:
            raise ScaleError("selection: nobody gave it a model to probe with")
        result = self.probe(spans)
        self.probed["documents"] += len(spans)
        self.probed["tokens"] += result.tokens
        self.probed["forwards"] += result.forwards
        good_N = np.isfinite(result.losses_N)
        pieces, first = np.unique(pieces_N[good_N], return_index=True)
        self.heard.append(_Heard(group, pieces, result.losses_N[good_N][first]))
        return np.where(good_N, result.losses_N, instead_N)

    def hear(self, group: int, pieces_N: np.ndarray, losses_N: np.ndarray) -> None:
        if group <= self.planning.until:
            raise ScaleError(f"selection: heard of group {group} after plans that may know group {self.planning.until}")
        self.heard.append(_Heard(group, pieces_N, losses_N))
        for view in (self.planning, self.saved):
            view.advance(self.heard, group - LAG)
        self._forget()

    def _forget(self) -> None:
        known = min(self.planning.until, self.saved.until)
        self.heard = [one for one in self.heard if one.group > known]

    def state_dict(self, drawn: int) -> dict[str, Any]:
        self.saved.advance(self.heard, drawn - LAG)
        waiting = [one for one in self.heard if one.group > self.saved.until]
        return {
            "foresight": self.saved.foresight.state_dict(),
            "until": self.saved.until,
            "heard": [[one.group, pack_array(one.pieces_N), pack_array(one.losses_N)] for one in waiting],
            "probed": dict(self.probed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for view in (self.planning, self.saved):
            view.foresight.load_state_dict(state["foresight"])
            view.until = state["until"]
        self.heard = [_Heard(group, unpack_array(p), unpack_array(losses)) for group, p, losses in state["heard"]]
        self.probed = dict(state["probed"])


def make_selector(
    config: SelectionConfig, documents: Sequence[np.ndarray], workers: int, ranks: Ranks
) -> LossSelector | None:
    """The selector of a run, None where selection is off; `documents` are, by source, the pieces up to and including each
    document. Raises UsageError."""
    if config.kind == "off":
        return None
    if config.probe and workers:
        raise UsageError(
            f"predict.selection.probe = {config.probe:g}: needs data.workers = 0 (it is {workers}), as what a forward pass "
            "says depends on how far ahead it is made"
        )

    def lead(values_N: np.ndarray) -> np.ndarray:
        mine = values_N if ranks.rank == 0 else np.zeros_like(values_N)
        return ranks.all_sum(torch.from_numpy(mine)).numpy()

    return LossSelector(config, Passages(documents), lead)
