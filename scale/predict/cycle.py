"""The state machine of predictive training:
warmup -> full -> (jump, or extrapolate) -> settle -> predict -> full.

A jump happens between two steps and costs forward passes only. `extrapolate`: full steps whose updates are repeated at once.
`settle`: the full steps after either, before its acceptance test. `predict`: the steps that it saved; they are counted, and the
schedule moves on, without a pass.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any, Literal

from torch import Tensor

from scale.config.predict import PredictConfig
from scale.predict.acceptance import CheckBatches, Kept, jump_in_parts
from scale.predict.controller import Decision
from scale.predict.ledger import Ledger
from scale.predict.steps_saved import FORWARD, LossRate, SavedSteps, corrected
from scale.predict.trial import AcceptanceReport, Trial
from scale.predict.weights.jump import Jump
from scale.predict.weights.statistics import StatisticsHook
from scale.protocols import Source
from scale.train.step import BackwardStepper

Phase = Literal["warmup", "full", "extrapolate", "settle", "predict"]
LONGEST_WAIT = 64
"""Waiting after failures grows to this many times `min_full` at most."""
MOST = 2
"""No more than this many times the steps of a jump are credited."""


class JumpCycle:
    """At most one trial at a time; its snapshot is kept until the acceptance test. The same on every rank; collective."""

    def __init__(self, full: BackwardStepper, config: PredictConfig, hook: StatisticsHook, ledger: Ledger):
        self.full, self.config, self.guard, self.hook, self.ledger = full, config, config.guard, hook, ledger
        self.ranks = full.strategy.ranks
        self.jump = Jump(full.strategy)
        self.check = CheckBatches(full.score, self.ranks, self.guard.tokens)
        self.rate = LossRate()
        self.savings = SavedSteps()
        self.phase: Phase = "warmup"
        self.since = 0
        """Full steps since the last jump or the last decision."""
        self.wait = config.min_full
        self.left = 0
        """Steps left in extrapolate, settle or predict."""
        self.open: Trial | None = None
        self.unsettled: list[float] | None = None
        """Of the last accepted jump: the most it can have saved, what it saved by its test, the rate of full steps before it,
        and after how many of them it was tested."""
        self.base: tuple[int, float] | None = None
        """(full steps made, check loss) of weights that no jump has moved since."""
        self.losses: list[float] = []
        """What the world model had forecast for the steps that are now counted."""

    @property
    def always(self) -> bool:
        return self.config.mode == "always"

    @property
    def check_cost(self) -> tuple[int, int]:
        """Forward passes on this rank, and tokens over all ranks, of one check."""
        group = self.check.group
        return (len(group.batches), group.tokens) if group else (0, 0)

    def ripe(self) -> bool:
        """Whether a jump may be decided for before the next step. Near the end there is no room left to test one."""
        needed = self.config.extrapolation_steps + self.guard.settle_steps + 1
        room = self.full.steps_done + needed < self.full.settings.steps
        waited = self.phase == "full" and self.since >= self.wait
        return self.config.mode != "observe" and waited and room and bool(self.hook.ready())

    def room(self) -> int:
        """Most steps that may be counted as predicted now: the last one of a run is real."""
        return max(0, self.full.settings.steps - self.full.steps_done - 1)

    def waited(self, pays: bool) -> None:
        """Wait as briefly as allowed after something that pays, twice as long as before after something that does not."""
        least = self.config.min_full
        self.wait = least if pays else min(2 * self.wait, LONGEST_WAIT * least)
        self.since = 0

    def try_jump(self, decision: Decision, source: Source) -> Trial:
        """Check, jump, check. The weights are moved if anything was kept, the same bits as before if not."""
        before = self.level(source)
        trial = Trial(decision, before, begun=self.ledger.full)
        if self.config.mode == "auto" and self.rate.value() is None:
            trial.tried = False
            self.waited(pays=True)  # the rate of full steps was measured; nothing was tried
            return trial
        kept = self._in_parts(decision, before, seed=(self.config.seed << 32) + self.full.steps_done)
        trial.after, trial.kept, trial.forwards = kept.after, kept.steps, kept.forwards
        self.ledger.attempts += 1
        self.ledger.rejected += kept.rejected
        if kept.steps:
            self.hook.restart()
            self.jump.land()
            self._begin(trial)
            self._settle_now()
        return trial

    def _in_parts(self, decision: Decision, before: float, seed: int) -> Kept:
        vectors = self.hook.directions[decision.direction].vectors()
        assert vectors is not None, "only directions that are ready are decided for"
        self.jump.snapshot()
        reach_KG, factor_P = decision.reach_KG, decision.factor_P
        return jump_in_parts(self.jump, vectors, reach_KG, self.guard, before, self._loss, seed, factor_P)

    def rejected(self, trial: Trial) -> float:
        """The reward of a jump of which nothing was kept."""
        cost = self._cost(trial.forwards + 1)
        self.savings.tried(-cost)
        reward = self.rate.reward(trial.before, trial.before, cost)
        self.waited(self.always or self.savings.pays)
        return reward

    def begin_extrapolation(self, decision: Decision, source: Source) -> Trial:
        """Check, and remember the weights: the updates of the coming full steps are repeated, then tested together."""
        trial = Trial(decision, self.level(source), begun=self.ledger.full, extrapolating=True)
        trial.tried = self.config.mode != "auto" or self.rate.value() is not None
        if trial.tried:
            self.ledger.attempts += 1
            self.jump.snapshot()
            self._begin(trial)
            self.phase, self.left = "extrapolate", self.config.extrapolation_steps
        else:
            self.waited(pays=True)
        return trial

    def _begin(self, trial: Trial) -> None:
        self.open, self.base = trial, None

    def _settle_now(self) -> None:
        self.phase, self.left, self.since = "settle", self.guard.settle_steps, 0

    def made(self, step: int, applied: bool) -> bool:
        """A full step was made (`applied`: not skipped). Returns whether its update was extrapolated."""
        extrapolated, enough = False, False
        if self.phase == "extrapolate" and applied:
            extrapolated, enough = True, not self._extrapolate(self.full.factor(step))
        self.since += 1
        if self.phase == "warmup" and step >= self.config.warmup:
            self.phase, self.since = "full", 0
        if self.phase in ("extrapolate", "settle"):
            self.left -= 1
        if self.phase == "extrapolate" and (enough or not self.left):
            self._settle_now()
        return extrapolated

    def _extrapolate(self, lr_factor: float) -> bool:
        """Repeat the update of the full step that was just made. Returns whether to go on: the weights must be within `drift`,
        and the check loss, every `correction_interval` steps and at last, finite and not above that at the beginning (with
        its tolerance)."""
        trial = self.open
        assert trial is not None, "extrapolation was not begun"
        self.hook.extrapolate(self.full.strategy, trial.decision.horizon, lr_factor)
        trial.extrapolated += 1
        trial.kept += trial.decision.horizon
        if self.jump.drift() > self.guard.drift:
            trial.ended = "drift"
        elif self.left == 1 or not trial.extrapolated % self.guard.correction_interval:
            trial.after = self._loss()
            trial.forwards += 1
            limit = trial.before + self.guard.tolerance * abs(trial.before)
            trial.ended = "" if trial.after <= limit else "loss"  # nan is not below
        return not trial.ended

    def due(self) -> bool:
        """Whether the acceptance test comes now: the settle steps are over."""
        return self.phase == "settle" and self.left == 0

    def accept(self) -> AcceptanceReport:
        """The check loss after the settle steps. A jump that left it higher is undone (in mode always only one that left it
        not finite). Credited are a share of its length (mode always), or (mode auto) the full steps that this one and those
        before it saved and that were not credited yet; at most the room that is left."""
        trial = self.open
        assert trial is not None, "no jump was taken"
        self.open = None
        settled = self.ledger.full - trial.begun
        after = self._loss()
        cost = settled + self._cost(trial.forwards + 2)
        known = self.rate.value() is not None  # in mode always not before the first jump: nothing is learned of it
        saved = self.rate.saved(trial.before, after, settled) if known else math.nan
        reward = self.rate.reward(trial.before, after, cost) if known else math.nan
        report = AcceptanceReport(trial, after, saved, reward, self.rate.value() or 0.0)
        if not trial.kept:  # every step whose update was to be repeated was skipped: there is nothing to test
            report.saved, report.reward, report.pays = math.nan, math.nan, True
        else:
            self._judge(report, settled, cost)
        self.phase, self.left = ("predict", report.credited) if report.credited else ("full", 0)
        self.waited(report.pays)
        return report

    def _judge(self, report: AcceptanceReport, settled: int, cost: float) -> None:
        trial, after, most = report.trial, report.after, MOST * report.trial.kept
        if not trial.extrapolating:
            went_on = 1 + settled / trial.kept
            report.stayed_P = [stayed / went_on for stayed in self.jump.stayed_P()]
        if not math.isfinite(after) or not (self.always or after < trial.before):
            self._undo(report)
            self.rate.undone(settled)
            self.savings.add(0 if self.always else -settled, cost - settled)
        else:
            due = self.guard.discount * trial.kept if self.always else self._due(report.saved, most)
            self.savings.add(due, cost - settled)
            self.rate.jumped(self.ledger.full, trial.before, after, settled)
            self.ledger.accepted += 1
        report.credited = self.savings.withdraw(min(most, self.room()))
        report.pays = self.always or self.savings.pays
        self.losses = (trial.decision.loss_K or [])[settled:]
        self.unsettled = None if self.always or report.undone else [most, report.saved, report.rate, settled]

    def settle(self, source: Source) -> int:
        """Before the next decision: steps that the last jump saved beyond those credited, now that the rate of full steps
        after it is known as well. They are counted at once; what was ripe is still ripe then."""
        self.level(source)
        if self.unsettled is None:
            return 0
        most, saved, rate, settled = self.unsettled
        self.unsettled, self.losses = None, []
        exact = corrected(saved, int(settled), rate, self.rate.latest())
        self.savings.balance += self._due(exact, most) - self._due(saved, most)
        extra = self.savings.withdraw(min(int(most), self.room()))
        if extra:
            self.phase, self.left = "predict", extra
        return extra

    def predicted(self) -> float | None:
        """One of the steps that the jump saved is counted: the loss that full steps would have had by then, as the world model
        forecast it before the jump; nothing beyond its horizon."""
        self.left -= 1
        if self.left == 0:
            self.phase = "full"
        return self.losses.pop(0) if self.losses else None

    def rest(self) -> None:
        """Leave what a trial began as it is, and go on with full steps."""
        self.open = None
        if self.phase in ("extrapolate", "settle", "predict"):
            self.phase, self.left = "full", 0

    def level(self, source: Source) -> float:
        """Check loss of the present weights; they are checked once."""
        self.check.draw(source)
        if self.base is None or self.base[0] != self.ledger.full:
            self.base = (self.ledger.full, self._loss())
            self.rate.add(*self.base)
        return self.base[1]

    def _undo(self, report: AcceptanceReport) -> None:
        self.jump.rollback()
        self.hook.restart()
        self.ledger.rejected += report.trial.kept
        report.undone = True

    def _due(self, saved: float, most: float) -> float:
        """Steps to be credited: a share of a gain, all of a loss."""
        return min(self.guard.discount * saved, most) if saved > 0 else saved

    def _cost(self, forwards: int) -> float:
        """Checking forwards, in full steps."""
        step_tokens = max(1, self.ledger.full_tokens // max(1, self.ledger.full))
        return forwards * (FORWARD * self.check_cost[1] / step_tokens)

    def _loss(self) -> float:
        start = time.perf_counter()
        loss = self.check.loss()
        self.ledger.check_forwards += 1
        self.ledger.check_tokens += self.check_cost[1]
        self.ledger.spend("check", time.perf_counter() - start)
        return loss

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Of the jump, while it may still be undone: auxiliary sharded state."""
        return self.jump.tensors(self.hook.names) if self.open is not None else {}

    def state_dict(self) -> dict[str, Any]:
        """Collective."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            **{name: getattr(self, name).state_dict() for name in _PARTS},
            "open": None if self.open is None else asdict(self.open),
            "base": None if self.base is None else list(self.base),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _PLAIN:
            setattr(self, name, state[name])
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.base = None if state["base"] is None else (state["base"][0], state["base"][1])
        self.open = None
        if state["open"] is not None:
            self.open = Trial(**(state["open"] | {"decision": Decision(**state["open"]["decision"])}))
            self.jump.snapshot()  # makes room; what was in it is read back by the stepper
            if not self.open.extrapolating:
                self.jump.land()


_PLAIN = ("phase", "since", "wait", "left", "unsettled", "losses")
_PARTS = ("check", "rate", "savings")
