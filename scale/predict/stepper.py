"""The predictive stepper: around the one that does real backward passes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Size, Tensor

from scale.config.predict import PredictConfig
from scale.errors import UsageError
from scale.parallel import companions
from scale.predict.controller import Controller, Decision
from scale.predict.cycle import JumpCycle
from scale.predict.ledger import Ledger
from scale.predict.moments import MadeStep
from scale.predict.weights.memory import footprint
from scale.predict.weights.statistics import StatisticsHook
from scale.protocols import Source, StepReport
from scale.train.step import BackwardStepper

STATE_VERSION = 2
"""Of what a checkpoint holds of prediction."""


@runtime_checkable
class Choosing(Protocol):
    """A source that leaves documents out (`scale.data.source.PackedSource`)."""

    def selection(self) -> dict[str, int]: ...


class PredictiveStepper:
    """Implements `scale.protocols.Stepper`. `full` does the real steps, and its strategy holds the weights. Collective."""

    def __init__(self, full: BackwardStepper, config: PredictConfig):
        self.full, self.config = full, config
        self.ranks = full.strategy.ranks
        self.steps = full.settings.steps
        self.controller = Controller(config, self.ranks.device)
        self.ledger = Ledger()
        with full.strategy.edit_masters() as shards:
            numel = sum(shard.param.numel() for shard in shards.values())
            self.memory = footprint(numel, config.directions)
            self.hook = StatisticsHook(self.ranks, shards, config.directions, config.every)
        full.watchers.append(self.hook)
        self.cycle = JumpCycle(full, config, self.hook, self.ledger)
        self.resumed = False

    def rehearse(self, source: Source) -> None:
        self.full.rehearse(source)

    def step(self, source: Source) -> StepReport:
        if self.cycle.phase == "predict":
            return self._predicted()
        forwards = self.ledger.check_forwards
        prediction: dict[str, Any] = {}
        if self.cycle.ripe():
            if self.cycle.settle(source):
                return self._predicted(self.ledger.check_forwards - forwards)
            prediction = self._decide(source)
        report = self._full(source)
        if self.cycle.due():
            prediction |= self._accept()
        checks, (passes, tokens) = self.ledger.check_forwards - forwards, self.cycle.check_cost
        report.forward_passes += checks * passes
        report.forward_tokens += checks * tokens
        report.prediction = prediction | self._accounts()
        if prediction and self.ranks.rank == 0:
            report.prediction |= self.controller.world.calibration.report()
        return report

    def _decide(self, source: Source) -> dict[str, Any]:
        """Ask the controller for a jump and try it. Returns what it reports."""
        done = self.full.steps_done
        longest = max(self.config.guard.settle_steps, *(horizon for horizon, _ in self.config.arms))
        factors = [self.full.factor(step) for step in range(done + 1, min(done + longest, self.steps) + 1)]
        answer = self.ranks.lead(
            lambda: self.controller.decide(
                done, self.steps, factors, self.hook.ready(), self.hook.last, self.cycle.jump.places
            )
        )
        if "stay" in answer:
            self.cycle.waited(pays=answer.get("soon", False) or self.cycle.always)
            return {"stay": answer["stay"], "confidence": answer.get("confidence")}
        decision = Decision(**answer["go"])
        if self.config.extrapolation_steps:
            return self.cycle.begin_extrapolation(decision, source).report()
        trial = self.cycle.try_jump(decision, source)
        if trial.kept:
            source.publish(done, lambda: self.full.strategy.full_params())
            if self.ranks.rank == 0:
                self.controller.jumped(trial.kept, decision.distance(trial.kept))
        elif trial.tried:
            self._learn(decision, self.cycle.rejected(trial))
        return trial.report()

    def _full(self, source: Source) -> StepReport:
        """A real step, and what prediction learns of it."""
        step = self.full.steps_done + 1
        phase, before = self.cycle.phase, self.hook.last
        self.hook.begin(step)
        report = self.full.step(source)
        applied = report.kind == "full"
        if applied:
            self.hook.moved(self.full.factor(step))
        made = MadeStep(
            step=step,
            lr_factor=self.full.factor(step),
            position=step / self.steps,
            tokens=report.tokens,
            seq_len=report.seq_len or 0,
            settling=phase in ("extrapolate", "settle"),
            loss=report.loss,
            grad_norm=report.grad_norm,
            skipped=report.kind == "skipped",
        )
        start = time.perf_counter()
        if self.ranks.rank == 0:
            diverged = self.controller.observe(made, before, self.hook.carried(step))
            self.ledger.divergences += diverged is not None
        self.ledger.spend("world", time.perf_counter() - start)
        self.ledger.spend("full", report.seconds)
        self.ledger.full += applied
        self.ledger.full_tokens += report.tokens if applied else 0
        self.ledger.skipped += report.kind == "skipped"
        self._account_selection(source, report)
        if self.cycle.made(step, applied) and self.ranks.rank == 0:
            self.controller.jumped(self.config.extrapolation_ratio, self.full.factor(step))
        if phase == "settle" and applied:
            report.kind = "correct"
        return report

    def _account_selection(self, source: Source, report: StepReport) -> None:
        """What choosing documents spared and cost, where the source chooses."""
        chosen: dict[str, int] = source.selection() if isinstance(source, Choosing) else {}
        if chosen:
            report.forward_passes += chosen["probe_forwards"] - self.ledger.probe_forwards
            report.forward_tokens += chosen["probe_tokens"] - self.ledger.probe_tokens
            for name, value in chosen.items():
                setattr(self.ledger, name, value)

    def _accept(self) -> dict[str, Any]:
        """The settle steps are over: how many steps did the jump save?"""
        report = self.cycle.accept()
        decision = report.trial.decision
        if math.isfinite(report.reward):
            self._learn(decision, report.reward)
        if self.ranks.rank == 0:
            if report.undone:
                self.controller.undone()
            if not report.trial.extrapolating:  # the world model forecasts a jump, not a row of updates
                stayed = dict(zip(self.cycle.jump.places, report.stayed_P, strict=True))
                self.controller.compare(self.full.steps_done, decision, report.trial.before - report.after, stayed)
        return report.report()

    def _learn(self, decision: Decision, reward: float) -> None:
        if self.ranks.rank == 0:
            self.controller.learn(decision, reward)

    def _predicted(self, checks: int = 0) -> StepReport:
        """One of the steps that the last jump saved: counted, without a pass or a token."""
        start = time.perf_counter()
        self.full.advance(1)
        loss = self.cycle.predicted()
        self.ledger.predicted += 1
        step = self.full.steps_done
        passes, tokens = self.cycle.check_cost
        return StepReport(
            step=step,
            kind="predict",
            loss=math.nan,
            grad_norm=math.nan,
            lr=self.full.settings.lr * self.full.factor(step),
            tokens=0,
            forward_passes=checks * passes,
            backward_passes=0,
            forward_tokens=checks * tokens,
            backward_tokens=0,
            seconds=time.perf_counter() - start,
            prediction=({} if loss is None else {"predicted_loss": loss}) | self._accounts(),
        )

    def _accounts(self) -> dict[str, Any]:
        return {"phase": self.cycle.phase, "ledger": self.ledger.counts()}

    def tensors(self) -> dict[str, Tensor]:
        with self.full.strategy.edit_masters() as shards:
            return companions.canonical(self.ranks, shards, self._auxiliary())

    def blank(self, saved: Mapping[str, Size]) -> dict[str, Tensor]:
        return companions.blank(self.ranks, saved)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ScaleError where the checkpoint was written under other directions."""
        if self.resumed:
            with self.full.strategy.edit_masters() as shards:
                companions.restore(self.ranks, shards, tensors, self._auxiliary())

    def _auxiliary(self) -> dict[str, dict[str, Tensor]]:
        return self.hook.tensors() | self.cycle.tensors()

    def state_dict(self) -> dict[str, Any]:
        """That of the backward stepper, and `predict`. Collective."""
        mine = {name: getattr(self, name).state_dict() for name in _PARTS}
        return self.full.state_dict() | {"predict": mine | {"version": STATE_VERSION, "made_for": self._made_for()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A run that went on without prediction so far is observed from here. Raises UsageError for settings that what was
        learned does not fit, and for the state of an older version."""
        self.full.load_state_dict(state)
        self.resumed = "predict" in state
        if not self.resumed:
            self.full.event("predict", f"step {self.full.steps_done}: no prediction so far; it is observed from here")
            return
        saved = state["predict"]
        if saved.get("version") != STATE_VERSION:
            raise UsageError(
                "predict: the checkpoint was written by an older version, whose prediction this one cannot carry on: add "
                "predict.enabled=false --allow-change predict, or finish the run with the version that began it"
            )
        for key, ours in self._made_for().items():
            if ours != (theirs := saved["made_for"].get(key)):
                raise UsageError(
                    f"{key} = {ours}: what the checkpoint has learned was made for {theirs} (keep it, or go on with "
                    "predict.enabled=false --allow-change predict)"
                )
        for name in _PARTS:
            getattr(self, name).load_state_dict(saved[name])
        if self.config.mode == "observe":
            self.cycle.rest()

    def _made_for(self) -> dict[str, Any]:
        """Settings that give what is learned its shape."""
        world = self.config.world.model_dump()
        shapes = {f"predict.world.{key}": world[key] for key in ("members", "hidden", "latent", "replay")}
        return shapes | {
            "predict.directions": list(self.config.directions),
            **(
                {"predict.extrapolation_ratio": self.config.extrapolation_ratio}
                if self.config.extrapolation_steps
                else {}
            ),
            **({} if self.config.extrapolation_steps else {"predict.horizons": list(self.config.horizons)}),
        }


_PARTS = ("controller", "ledger", "hook", "cycle")
