"""Which share of the documents to train on: tried in episodes of full steps, between episodes on all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from scale.config.predict import SelectionConfig
from scale.errors import UsageError
from scale.parallel.ranks import Ranks
from scale.predict.bandit import Bandit
from scale.predict.ledger import Ledger
from scale.predict.worth import cost_of_forward
from scale.protocols import Source

ALL = 1.0
CONTEXT = 3
"""Numbers in a context."""
LONGEST = 8
"""Episodes on a share between two on all documents, at most."""


@runtime_checkable
class Adjustable(Protocol):
    """A source whose share of documents can be chosen (`scale.data.source.PackedSource`)."""

    def share(self) -> float | None: ...

    def choose(self, keep: float) -> None: ...


@dataclass
class Episode:
    """Full steps on one share. `begun` and `loss` are the full steps made and the check loss at its start."""

    share: float
    context: list[float]
    begun: int
    loss: float
    probed: int
    """Tokens of forward passes of selection up to its start."""
    middle: float = 0.0
    rate: float = 0.0
    """Fall of the check loss per full step or its cost."""


class ShareControl:
    """LinUCB over shares. All documents stand for staying: their reward is 0.

    Losses fall ever more slowly, so what a share brings is compared with what all documents bring just before and just
    after, at its place between the two; what lies behind it alone would call every share slow. A share that paid is kept
    for twice as many episodes until all documents come again, one that did not for a single one.

    A choice holds for windows that are opened `LAG` groups later; until rows of these alone are drawn, and `relax` steps
    more, nothing is measured. No jump may be thought of while `measuring`, and no episode begins while one is judged: so
    none has a jump in it. `level` checks the present weights, `context` is asked on rank 0. Collective.
    """

    def __init__(
        self,
        config: SelectionConfig,
        relax: int,
        ranks: Ranks,
        ledger: Ledger,
        level: Callable[[Source], float],
        context: Callable[[], list[float]],
    ):
        self.length, self.relax, self.ranks, self.ledger = config.episode, relax, ranks, ledger
        self.level, self.context = level, context
        self.bandit = Bandit([(share, "share") for share in config.arms], CONTEXT)
        self.share, self.where = ALL, [1.0, 0.0, 0.0]
        """What was chosen last, and in what context."""
        self.settled = 0
        """Steps in a row that were made on that share alone."""
        self.now: Episode | None = None
        self.base: Episode | None = None
        """The last one on all documents."""
        self.waiting: list[Episode] = []
        """Those on a share since then."""
        self.streak = 1

    @property
    def measuring(self) -> bool:
        return self.now is not None

    def before(self, source: Source) -> None:
        """A full step is about to be made, and no jump is open."""
        if self.now is None and self.settled >= self.relax:
            probed = self.ledger.probe_tokens
            loss = self.level(source)
            self.now = Episode(self.share, self.where, self.ledger.full, loss, probed)

    def after(self, source: Source) -> dict[str, Any]:
        """A step was made. Says what was decided, where an episode is over. Raises UsageError for a source that takes no
        choice."""
        if not isinstance(source, Adjustable):
            raise UsageError("predict.selection.control = 'bandit': this source does not choose documents")
        self.settled = self.settled + 1 if source.share() == self.share else 0
        if self.now is None or self.ledger.full - self.now.begun < self.length:
            return {}
        episode, self.now = self._over(self.now, self.level(source)), None
        rewards = self._hear(episode)
        share = self._next(episode)
        if share != self.share:
            self.share, self.settled = share, 0
            source.choose(share)
        said = {"share": share, "share_rate": episode.rate if math.isfinite(episode.rate) else None}
        return said | ({"share_reward": sum(rewards) / len(rewards)} if rewards else {})

    def _over(self, episode: Episode, loss: float) -> Episode:
        steps = self.ledger.full - episode.begun
        step_tokens = self.ledger.full_tokens // self.ledger.full
        cost = steps + cost_of_forward(self.ledger.probe_tokens - episode.probed, step_tokens)
        episode.middle, episode.rate = episode.begun + steps / 2, (episode.loss - loss) / cost
        return episode

    def _hear(self, episode: Episode) -> list[float]:
        """Rewards that are known now that it is over: those of the shares between two episodes on all documents."""
        if not math.isfinite(episode.rate):
            self.base, self.waiting, self.streak = None, [], 1
            return []
        if episode.share != ALL:
            self.waiting.append(episode)
            return []
        rewards = []
        if self.base is not None:
            rewards = [gain(tried.rate, between(self.base, episode, tried.middle)) for tried in self.waiting]
        for tried, reward in zip(self.waiting, rewards, strict=True):
            self.bandit.learn((tried.share, "share"), tried.context, reward)
        if rewards:
            self.streak = min(2 * self.streak, LONGEST) if sum(rewards) > 0 else 1
        self.base, self.waiting = episode, []
        return rewards

    def _next(self, episode: Episode) -> float:
        """The same share again, all documents to compare it with, or what the bandit chooses."""
        if self.base is None:
            return ALL
        if episode.share != ALL:
            return episode.share if episode.rate > 0 and len(self.waiting) < self.streak else ALL
        self.where, share = self.ranks.lead(self._think)
        return float(share)

    def _think(self) -> tuple[list[float], float]:
        context = self.context()
        number, name = self.bandit.choose(context)
        return context, number if name == "share" else ALL

    def state_dict(self) -> dict[str, Any]:
        return {
            "bandit": self.bandit.state_dict(),
            "share": self.share,
            "where": list(self.where),
            "settled": self.settled,
            "now": None if self.now is None else asdict(self.now),
            "base": None if self.base is None else asdict(self.base),
            "waiting": [asdict(episode) for episode in self.waiting],
            "streak": self.streak,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bandit.load_state_dict(state["bandit"])
        self.share, self.where = state["share"], list(state["where"])
        self.settled, self.streak = state["settled"], state["streak"]
        self.now, self.base = (None if state[name] is None else Episode(**state[name]) for name in ("now", "base"))
        self.waiting = [Episode(**episode) for episode in state["waiting"]]


def between(first: Episode, last: Episode, middle: float) -> float:
    """The rate at a place between two episodes. Loss that falls as an exponential falls at a rate that does so as well."""
    place = (middle - first.middle) / (last.middle - first.middle)
    if first.rate > 0 and last.rate > 0:
        return first.rate ** (1 - place) * last.rate**place
    return first.rate + place * (last.rate - first.rate)


def gain(rate: float, other: float) -> float:
    """How much faster the loss fell than at the other rate, as a share of the greater one: 0 is as fast, 0.5 twice as fast,
    -0.5 half as fast; -1 to 1."""
    return min(1.0, max(-1.0, (rate - other) / (max(abs(rate), abs(other)) or 1.0)))
