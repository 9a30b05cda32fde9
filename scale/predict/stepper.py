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
from scale.predict.attempt import Attempt, Attempts
from scale.predict.brain import Brain
from scale.predict.features import Coming
from scale.predict.ledger import Ledger
from scale.predict.moments import StepFacts
from scale.predict.phases import Phases
from scale.predict.selection.control import ShareControl
from scale.predict.weights.carry import Carry
from scale.predict.weights.look import Looks
from scale.predict.weights.memory import check_budget, footprint
from scale.protocols import Source, StepReport
from scale.train.step import BackwardStepper


@runtime_checkable
class Choosing(Protocol):
    """A source that leaves documents out (`scale.data.source.PackedSource`)."""

    def selection(self) -> dict[str, int]: ...


class PredictiveStepper:
    """Implements `scale.protocols.Stepper`. `full` does the real steps, and its strategy holds the weights.

    Raises UsageError if the directions cannot work with the strategy or need more memory than is allowed. Collective.
    """

    def __init__(self, full: BackwardStepper, config: PredictConfig):
        self.full, self.config, self.event = full, config, full.event
        self.ranks = full.strategy.ranks
        self.steps = full.settings.steps
        self.phases = Phases(config, self.steps)
        self.brain = Brain(config)
        self.ledger = Ledger()
        with full.strategy.edit_masters() as shards:
            numel = sum(shard.param.numel() for shard in shards.values())
            self.memory = footprint(numel, config.directions, config.guard.offload, config.use)
            check_budget(config.guard.memory, self.memory)
            self.looks = Looks(self.ranks, shards, config.directions, config.every, Carry(self.ranks, shards))
        full.watchers.append(self.looks)
        self.attempts = Attempts(full, config, self.looks, self.ledger)
        self.control = self._make_control() if config.selection.control == "bandit" else None
        self.resumed = False

    def _make_control(self) -> ShareControl:
        def context() -> list[float]:
            return self.brain.share_context(self.full.steps_done / self.steps)

        config, relax = self.config.selection, self.config.guard.relax
        return ShareControl(config, relax, self.ranks, self.ledger, self.attempts.level, context)

    def rehearse(self, source: Source) -> None:
        self.full.rehearse(source)

    def step(self, source: Source) -> StepReport:
        if self.phases.phase == "predict":
            return self._predicted()
        said: dict[str, Any] = {}
        forwards = self.ledger.check_forwards
        if self._may_jump():
            if extra := self.attempts.settle(source, self.phases.room(self.full.steps_done)):
                self.phases.credited(extra)
                return self._predicted(self._checked(forwards))
            said |= self._jump(source)
        if self.control and self.phases.phase == "full":
            self.control.before(source)
        report = self._full(source)
        if self.phases.to_judge():
            said |= self._judge()
        chosen = self.control.after(source) if self.control else {}
        forwards = self._checked(forwards)
        report.forward_passes += forwards * self.attempts.passes
        report.forward_tokens += forwards * self.attempts.tokens
        report.prediction = said | chosen | self._accounts()
        if said and self.ranks.rank == 0:
            report.prediction |= self.brain.foresight.calibration.report()
        if why := self.reached():
            report.prediction["stop"] = why
        return report

    def reached(self) -> str | None:
        """Implements `scale.train.loop.Ending`: whether the predicted weights that are kept are as good as was asked for."""
        shadow, enough = self.attempts.shadow, self.config.stop_below
        if enough is None or shadow.loss > enough:
            return None
        found = f"check loss {shadow.loss:.4f} of the predicted weights of step {shadow.step}"
        return f"{found} <= predict.stop_below = {enough:g}"

    def _may_jump(self) -> bool:
        """Whether a jump may be thought of: before a direction is known, nothing is checked for it."""
        ripe = self.phases.ripe(self.full.steps_done) and bool(self.looks.ready())
        return ripe and not (self.control and self.control.measuring)

    def _full(self, source: Source) -> StepReport:
        """A real step, heard of before and after."""
        step = self.full.steps_done + 1
        striding, relaxing = self.phases.phase == "stride", self.phases.phase in ("stride", "correct")
        self.looks.begin(step)
        stats = self.looks.last
        report = self.full.step(source)
        if report.kind == "full":
            self.looks.moved(self.full.factor(step))
        facts = StepFacts(
            step=step,
            loss=report.loss,
            grad_norm=report.grad_norm,
            lr_factor=self.full.factor(step),
            position=step / self.steps,
            tokens=report.tokens,
            seq_len=report.seq_len or 0,
            skipped=report.kind == "skipped",
            relaxing=relaxing,
        )
        start = time.perf_counter()
        if self.ranks.rank == 0:
            self.brain.before(Coming.of(facts), stats)
            diverged = self.brain.after(facts, self._carry(step))
            self.ledger.divergences += diverged is not None
        self.ledger.spend("world", time.perf_counter() - start)
        self.ledger.spend("full", report.seconds)
        self.ledger.full += report.kind == "full"
        self.ledger.full_tokens += report.tokens if report.kind == "full" else 0
        self.ledger.skipped += report.kind == "skipped"
        self._account_selection(source, report)
        going_on = not (striding and report.kind == "full") or self._stride(step)
        self.phases.made(step)
        if striding and not going_on and self.phases.phase == "stride":
            self.phases.jumped()
        if relaxing and not striding and report.kind == "full":
            report.kind = "correct"
        return report

    def _stride(self, step: int) -> bool:
        """Carry on the step that was just made. Returns whether to go on."""
        going_on = self.attempts.stride(self.full.factor(step), last=self.phases.left == 1)
        if self.ranks.rank == 0 and self.attempts.open:
            self.brain.jumped(self.attempts.open.decision.horizon, self.full.factor(step))
        return going_on

    def _account_selection(self, source: Source, report: StepReport) -> None:
        """What choosing documents spared and cost, where the source chooses."""
        chosen: dict[str, int] = source.selection() if isinstance(source, Choosing) else {}
        if chosen:
            report.forward_passes += chosen["probe_forwards"] - self.ledger.probe_forwards
            report.forward_tokens += chosen["probe_tokens"] - self.ledger.probe_tokens
            for name, value in chosen.items():
                setattr(self.ledger, name, value)

    def _carry(self, step: int) -> list[float] | None:
        """What was read in this step, if it was looked at."""
        stats, carry = self.looks.last, self.looks.carry
        return carry.last if carry is not None and stats is not None and stats.step == step else None

    def _jump(self, source: Source) -> dict[str, Any]:
        """Ask for a jump and try it."""
        done = self.full.steps_done
        longest = max(*self.config.horizons, self.config.guard.relax)
        factors = [self.full.factor(step) for step in range(done + 1, min(done + longest, self.steps) + 1)]
        said = self.ranks.lead(
            lambda: self.brain.decide(
                done, self.steps, factors, self.looks.ready(), self.looks.last, self.attempts.jump.places
            )
        )
        if "stay" in said:
            self.phases.waited(paid=said.get("soon", False) or self.config.mode == "always")
            return {"stay": said["stay"], "confidence": said.get("confidence")}
        if self.config.strides:
            attempt = self.attempts.begin_strides(said["go"], source)
            if attempt.tried:
                self.phases.striding()
            else:
                self.phases.waited(paid=True)
            return attempt.says()
        attempt = self.attempts.start(said["go"], source, done)
        if attempt.kept:
            source.publish(done, lambda: self.full.strategy.full_params())
            self.phases.jumped()
            if self.ranks.rank == 0:
                self.brain.jumped(attempt.kept, attempt.decision.distance(attempt.kept))
        elif attempt.tried:
            self._learn(attempt, self.attempts.reward(attempt))
            self.phases.waited(
                paid=self.config.use == "shadow" or self.config.mode == "always" or self.attempts.account.pays
            )
        else:
            self.phases.waited(paid=True)  # the rate of full steps was measured; nothing was tried
        return attempt.says()

    def _judge(self) -> dict[str, Any]:
        """The relaxing steps are over: what was the jump worth?"""
        verdict = self.attempts.judge(self.phases.room(self.full.steps_done))
        if math.isfinite(verdict.reward):
            self._learn(verdict.attempt, verdict.reward)
        if self.ranks.rank == 0:
            if verdict.undone:
                self.brain.undone()
            if not verdict.attempt.striding:  # the world model foresees a jump, not a policy
                stayed = dict(zip(self.attempts.jump.places, verdict.stayed_P, strict=True))
                gain = verdict.attempt.before - verdict.after
                self.brain.compare(self.full.steps_done, verdict.attempt.decision, gain, stayed)
        self.phases.judged(verdict.credit, verdict.paid)
        return verdict.says()

    def _learn(self, attempt: Attempt, reward: float) -> None:
        if self.ranks.rank == 0:
            self.brain.learn(attempt.decision, reward)

    def _checked(self, before: int) -> int:
        """Checking forwards since there were `before`."""
        return self.ledger.check_forwards - before

    def _predicted(self, forwards: int = 0) -> StepReport:
        """One of the steps that the last jump was worth: counted, without a pass or a token."""
        start = time.perf_counter()
        self.full.advance(1)
        self.phases.predicted()
        self.ledger.predicted += 1
        step = self.full.steps_done
        return StepReport(
            step=step,
            kind="predict",
            loss=math.nan,
            grad_norm=math.nan,
            lr=self.full.settings.lr * self.full.factor(step),
            tokens=0,
            forward_passes=forwards * self.attempts.passes,
            backward_passes=0,
            forward_tokens=forwards * self.attempts.tokens,
            backward_tokens=0,
            seconds=time.perf_counter() - start,
            prediction=self.attempts.foreseen() | self._accounts(),
        )

    def _accounts(self) -> dict[str, Any]:
        return {"phase": self.phases.phase, "ledger": self.ledger.counts()}

    def tensors(self) -> dict[str, Tensor]:
        with self.full.strategy.edit_masters() as shards:
            return companions.canonical(self.ranks, shards, self._companions())

    def blank(self, saved: Mapping[str, Size]) -> dict[str, Tensor]:
        return companions.blank(self.ranks, saved)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ScaleError where the checkpoint was written under other directions."""
        if self.resumed:
            with self.full.strategy.edit_masters() as shards:
                companions.restore(self.ranks, shards, tensors, self._companions())

    def _companions(self) -> dict[str, dict[str, Tensor]]:
        return self.looks.companions() | self.attempts.companions()

    def state_dict(self) -> dict[str, Any]:
        """That of the backward stepper, and `predict`. Collective."""
        mine = {
            "made_for": self._made_for(),
            "phases": self.phases.state_dict(),
            "brain": self.brain.state_dict(),
            "ledger": self.ledger.state_dict(),
            "looks": self.looks.state_dict(),
            "attempts": self.attempts.state_dict(),
            "control": self.control.state_dict() if self.control else None,
        }
        return self.full.state_dict() | {"predict": mine}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A run that went on without prediction so far begins to watch from here. Raises UsageError for settings that
        what was learned does not fit."""
        self.full.load_state_dict(state)
        self.resumed = "predict" in state
        if self.resumed:
            for key, ours in self._made_for().items():
                if ours != (saved := state["predict"]["made_for"][key]):
                    raise UsageError(
                        f"{key} = {ours}: what the checkpoint has learned was made for {saved} (keep it, or go on with "
                        "predict.enabled=false)"
                    )
            for name in ("phases", "brain", "ledger", "looks", "attempts"):
                getattr(self, name).load_state_dict(state["predict"][name])
            if self.control:
                self.control.load_state_dict(state["predict"]["control"])
            no_strides = self.phases.phase == "stride" and not self.config.strides
            if (
                self.config.mode == "observe" or no_strides
            ):  # what was begun is left as it is: nothing is moved or put back
                self.attempts.open = None
                self.phases.rest()
        else:
            self.event("predict", f"step {self.full.steps_done}: no prediction so far; it begins to watch here")

    def _made_for(self) -> dict[str, Any]:
        """Settings that give what is learned its shape."""
        config = self.config.model_dump(mode="json")
        shapes = {f"predict.{key}": config[key] for key in ("directions", "horizons")}
        selection = self.config.selection
        shapes["predict.selection.control"] = selection.control
        shapes["predict.selection.shares"] = list(selection.arms) if selection.control == "bandit" else []
        return shapes | {
            f"predict.world.{key}": config["world"][key] for key in ("members", "hidden", "latent", "replay")
        }
