"""One jump from its check before to its verdict after: tried part by part, relaxed by full steps, judged, perhaps undone."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from scale.config.predict import PredictConfig
from scale.predict.brain import Decision
from scale.predict.guard import CheckSet, Climb, climb
from scale.predict.ledger import Ledger
from scale.predict.shadow import Shadow
from scale.predict.weights.jump import Jump
from scale.predict.weights.look import Looks
from scale.predict.worth import Account, Rate, cost_of_forward, settled
from scale.protocols import Source
from scale.train.step import BackwardStepper

MOST = 2
"""A jump is never credited with more than this many times the steps it went."""


@dataclass
class Attempt:
    """A jump that was thought of. Not `tried`: first the rate of full steps has to be known."""

    decision: Decision
    before: float
    tried: bool = True
    after: float = math.nan
    """Check loss right after the jump, before relaxing."""
    kept: int = 0
    forwards: int = 0
    """Beside those before the jump and after relaxing."""
    shadow: float | None = None
    """Check loss of the weights that were kept beside training."""
    begun: int = 0
    """Full steps that were made before it."""
    striding: bool = False
    """Not one jump: `strides` full steps were carried on, `kept` steps in all."""
    strides: int = 0
    ended: str = ""
    """The check that ended strides early."""

    def says(self) -> dict[str, Any]:
        """At its beginning."""
        said = {
            "direction": self.decision.direction,
            "horizon": self.decision.horizon,
            "confidence": self.decision.confidence,
            "check_before": self.before,
            "expected_gain": self.decision.expected,
        }
        return said if self.striding else said | {"check_after": self.after, "kept": self.kept, "shadow": self.shadow}

    def says_of_strides(self) -> dict[str, Any]:
        """At its end."""
        if not self.striding:
            return {}
        return {"check_after": self.after, "kept": self.kept, "strides": self.strides, "ended": self.ended or None}


@dataclass
class Verdict:
    """What a jump was worth: `credit` steps are counted without being made."""

    attempt: Attempt
    after: float
    worth: float
    reward: float
    credit: int
    rate: float = 0.0
    """Of full steps before the jump."""
    undone: bool = False
    paid: bool = False
    """Whether the last attempts together were worth more than they cost."""
    stayed_P: list[float] = field(default_factory=list)
    """How much of the jump was left after relaxing, beside training going on along it; by place."""

    def says(self) -> dict[str, Any]:
        return self.attempt.says_of_strides() | {
            "check_relaxed": self.after,
            "worth": self.worth,
            "reward": self.reward,
            "credit": self.credit,
            "undone": self.undone,
        }


class Attempts:
    """At most one jump at a time; collective. The snapshot is kept until the verdict."""

    def __init__(self, full: BackwardStepper, config: PredictConfig, looks: Looks, ledger: Ledger):
        self.full, self.config, self.looks, self.ledger = full, config, looks, ledger
        self.ranks = full.strategy.ranks
        self.jump = Jump(full.strategy, config.guard.offload)
        self.check = CheckSet(full.score, self.ranks, config.guard.tokens)
        self.shadow = Shadow(full.strategy)
        self.rate = Rate()
        self.account = Account()
        self.open: Attempt | None = None
        self.share: float | None = None
        """Measured cost of a forward beside a full step on as many tokens."""
        self.unsettled: list[float] | None = None
        """Of the last jump: the most it can be worth, what it was judged to be worth, the rate of full steps before it, and
        after how many of them it was judged."""
        self.base: tuple[int, float] | None = None
        """(full steps made, check loss) of weights that no jump has moved since."""
        self.losses: list[float] = []
        """What the world model had foreseen for the steps that are now counted."""

    @property
    def tokens(self) -> int:
        """Of one checking forward, over all ranks."""
        return self.check.group.tokens if self.check.group else 0

    @property
    def passes(self) -> int:
        """Forward passes of one check, on each rank."""
        return len(self.check.group.batches) if self.check.group else 0

    def start(self, go: dict[str, Any], source: Source, step: int) -> Attempt:
        """Check, jump, check. The weights are moved if anything was kept, the same bits as before if not."""
        decision = Decision(**go)
        before = self.level(source)
        attempt = Attempt(decision, before, begun=self.made)
        if self.config.mode == "auto" and self.rate.value() is None:
            attempt.tried = False
            return attempt
        found = self._climb(decision, before, seed=(self.config.seed << 32) + step)
        attempt.after, attempt.kept, attempt.forwards = found.after, found.kept, found.forwards
        self.ledger.attempts += 1
        self.ledger.rejected += found.rejected
        if self.config.use == "shadow":
            if found.after < before and self.shadow.offer(step, found.after):
                attempt.shadow = found.after
            self.jump.rollback()
            attempt.kept = 0
            return attempt
        if found.kept:
            self.base = None
            self.looks.restart()
            self.jump.land()
            self.open = attempt
        return attempt

    def begin_strides(self, go: dict[str, Any], source: Source) -> Attempt:
        """Check, and remember the weights: the full steps to come are carried on, until all are judged together."""
        before = self.level(source)
        attempt = Attempt(Decision(**go), before, begun=self.made, striding=True)
        attempt.tried = self.config.mode != "auto" or self.rate.value() is not None
        if attempt.tried:
            self.ledger.attempts += 1
            self.base = None
            self.jump.snapshot()
            self.open = attempt
        return attempt

    def stride(self, lr_factor: float, last: bool) -> bool:
        """Carry on the full step that was just made by as many steps as the horizon says. Returns whether to go on: the weights
        must be within `drift`, and the check loss, every `correction_interval` steps and at last, finite and not above that at
        the beginning (with its tolerance)."""
        attempt, guard = self.open, self.config.guard
        assert attempt is not None, "strides were not begun"
        self.looks.carry_on(self.full.strategy, attempt.decision.horizon, lr_factor)
        attempt.strides += 1
        attempt.kept += attempt.decision.horizon
        if self.jump.drift() > guard.drift:
            attempt.ended = "drift"
        elif last or not attempt.strides % guard.correction_interval:
            attempt.after = self._loss()
            attempt.forwards += 1
            limit = attempt.before + guard.tolerance * abs(attempt.before)
            attempt.ended = "" if attempt.after <= limit else "loss"  # nan is not below
        return not attempt.ended

    def _climb(self, decision: Decision, before: float, seed: int) -> Climb:
        reach_KG = decision.reach_KG

        def part(first: int, last: int) -> list[float]:
            start_G = reach_KG[first - 1] if first else [0.0] * len(reach_KG[0])
            return [b - a for a, b in zip(start_G, reach_KG[last - 1], strict=True)]

        vectors = self.looks.directions[decision.direction].vectors()
        assert vectors is not None, "only directions that are ready are decided for"
        self.jump.snapshot()
        return climb(
            self.jump, vectors, part, decision.horizon, self.config.guard, before, self._loss, seed, decision.factor_P
        )

    def judge(self, room: int) -> Verdict:
        """Look at the check loss after relaxing. A jump that left it higher is undone (in mode always only one that left it
        not finite). Credited are a share of its length (mode always), or (mode auto) the full steps that this one and those
        before it were worth and that were not credited yet; at most `room`."""
        attempt = self.open
        assert attempt is not None, "no jump was taken"
        relaxed = self.made - attempt.begun
        after = self._loss()
        cost = relaxed + self.cost(attempt.forwards + 2)
        known = self.rate.value() is not None  # in mode always not before the first jump: nothing is learned of it
        worth = self.rate.worth(attempt.before, after, relaxed) if known else math.nan
        reward = self.rate.reward(attempt.before, after, cost) if known else math.nan
        verdict = Verdict(attempt, after, worth, reward, credit=0, rate=self.rate.value() or 0.0)
        if not attempt.kept:  # every step that was to be carried on was skipped: there is nothing to judge
            self.open = None
            return replace(verdict, worth=math.nan, reward=math.nan, paid=True)
        if not attempt.striding:
            carried_on = 1 + relaxed / attempt.kept
            verdict.stayed_P = [stayed / carried_on for stayed in self.jump.stayed_P()]
        always = self.config.mode == "always"
        most = MOST * attempt.kept
        if not math.isfinite(after) or not (always or after < attempt.before):
            self._undo(verdict)
            self.rate.undone(relaxed)
            self.account.add(0 if always else -relaxed, cost - relaxed)
        else:
            due = self.config.guard.credit * attempt.kept if always else self._due(worth, most)
            self.account.add(due, cost - relaxed)
            self.rate.jumped(self.made, attempt.before, after, relaxed)
            self.ledger.accepted += 1
        verdict.credit = self.account.withdraw(min(most, room))
        verdict.paid = always or self.account.pays
        self.losses = (attempt.decision.loss_K or [])[relaxed:]
        self.open = None
        self.unsettled = None if always or verdict.undone else [most, worth, verdict.rate, relaxed]
        return verdict

    def settle(self, source: Source, room: int) -> int:
        """Before the next attempt: steps that the last jump was worth beyond its credit, now that the rate of full steps
        after it is known as well."""
        self.level(source)
        if self.unsettled is None:
            return 0
        most, worth, rate, relaxed = self.unsettled
        self.unsettled, self.losses = None, []
        exact = settled(worth, int(relaxed), rate, self.rate.latest())
        self.account.balance += self._due(exact, most) - self._due(worth, most)
        return self.account.withdraw(min(int(most), room))

    def _due(self, worth: float, most: float) -> float:
        """Steps to be credited for a worth: a share of a gain, all of a loss."""
        return min(self.config.guard.credit * worth, most) if worth > 0 else worth

    def level(self, source: Source) -> float:
        """Check loss of the present weights; they are checked once."""
        self.check.draw(source)
        if self.base is None or self.base[0] != self.made:
            begun = time.perf_counter()
            self.base = (self.made, self._loss())
            self._time(time.perf_counter() - begun)
            self.rate.note(*self.base)
        return self.base[1]

    def _undo(self, verdict: Verdict) -> None:
        self.jump.rollback()
        self.looks.restart()
        self.ledger.rejected += verdict.attempt.kept
        verdict.undone = True

    def foreseen(self) -> dict[str, Any]:
        """The loss that full steps would have had by the step that is counted next, as the world model saw it before the
        jump; nothing beyond its horizon."""
        if not self.losses:
            return {}
        now, *self.losses = self.losses
        return {"predicted_loss": now}

    def reward(self, attempt: Attempt) -> float:
        """Of a jump of which nothing was kept."""
        cost = self.cost(attempt.forwards + 1)
        self.account.tried(-cost)
        return self.rate.reward(attempt.before, attempt.before, cost)

    def cost(self, forwards: int) -> float:
        """Checking forwards, in full steps."""
        share = 1 / 3 if self.share is None else self.share
        return forwards * cost_of_forward(self.tokens, self.step_tokens, share)

    @property
    def made(self) -> int:
        """Full steps made so far."""
        return self.ledger.full

    @property
    def step_tokens(self) -> int:
        return max(1, self.ledger.full_tokens // max(1, self.ledger.full))

    def _loss(self) -> float:
        start = time.perf_counter()
        loss = self.check.loss()
        self.ledger.check_forwards += 1
        self.ledger.check_tokens += self.tokens
        self.ledger.spend("check", time.perf_counter() - start)
        return loss

    def _time(self, seconds: float) -> None:
        """Measure what a forward costs, once, on rank 0."""
        if self.config.costs == "measured" and self.share is None:
            mean = self.ledger.seconds.get("full", 0.0) / max(1, self.ledger.full)
            ratio = seconds / mean * self.step_tokens / max(1, self.tokens) if mean else 1 / 3
            self.share = float(self.ranks.lead(lambda: ratio))

    def companions(self) -> dict[str, dict[str, Tensor]]:
        """Of the jump, while it may still be undone, and of the shadow."""
        jump = self.jump.companions(self.looks.names) if self.open is not None else {}
        return jump | self.shadow.companions()

    def state_dict(self) -> dict[str, Any]:
        """Collective."""
        return {
            "check": self.check.state_dict(),
            "shadow": self.shadow.state_dict(),
            "rate": self.rate.state_dict(),
            "account": self.account.state_dict(),
            "open": None if self.open is None else asdict(self.open),
            "share": self.share,
            "losses": self.losses,
            "unsettled": self.unsettled,
            "base": None if self.base is None else list(self.base),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check.load_state_dict(state["check"])
        self.shadow.load_state_dict(state["shadow"])
        self.rate.load_state_dict(state["rate"])
        self.account.load_state_dict(state["account"])
        self.share, self.losses, self.open = state["share"], state["losses"], None
        self.unsettled = state["unsettled"]
        self.base = None if state["base"] is None else (state["base"][0], state["base"][1])
        if state["open"] is not None:
            self.open = Attempt(**(state["open"] | {"decision": Decision(**state["open"]["decision"])}))
            self.jump.snapshot()  # makes room; what was in it is read back by the stepper
            if not self.open.striding:
                self.jump.land()
