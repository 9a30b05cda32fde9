"""A training run: parts in, run folder out. Works for any torch module, source and objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from scale.checkpoint.rng import load_rng_state, rng_state, seed_all
from scale.checkpoint.saved import newest_record
from scale.checkpoint.store import Checkpoints, Saved
from scale.config.optim import OptimConfig, ScheduleConfig, SpikeConfig
from scale.config.run import CheckpointConfig, EarlyStop, ProfileConfig
from scale.data.workers import dead_workers_in_one_line
from scale.errors import ScaleError, UsageError
from scale.files import write_atomic
from scale.hardware import detect
from scale.monitor.recorder import Bystander, RunRecorder
from scale.monitor.run_folder import RunFolder
from scale.objectives.root import Root
from scale.parallel.ranks import lost_peers_in_one_line
from scale.parallel.single import Single
from scale.protocols import Judge, Monitor, Objective, Source, Stateful, Stepper, Strategy, Weights
from scale.sealed import write_sealed
from scale.streams import guarded_output
from scale.train.loop import Loop, LoopSettings, Outcome
from scale.train.profile import StepProfiler
from scale.train.step import BackwardStepper, StepSettings
from scale.train.stop import StopSignal, stop_file

DYING_SAVE_SECONDS = 20
"""How long a failing rank waits for a save that the other ranks may never finish."""
INTERRUPTED_SAVE_SECONDS = 1
"""How long a run that ends at once waits for a save: one that is cut off leaves the checkpoint before."""
PREDICTION = "predict/"
"""Names of the stepper's own tensors in a checkpoint."""


class Trainer:
    """Trains `model` on what `source` draws, as `objective` says, into the run folder `folder`.

    The same folder used again continues where its newest good checkpoint ended. The model is moved to the strategy's
    device and wrapped; `trainer.model` is the module you gave. `judge` makes a judge from the wrapped module, `assets`
    writes files that belong to the run into its `model/` folder. `settled` are automatic choices that a resumed run must
    share. Without a `strategy` the run is on one device, the GPU if there is one. Lengths and intervals are in steps.
    `split` makes micro-batches that many times smaller than drawn. With a strategy of several ranks every rank makes the
    same Trainer; rank 0 alone writes into the folder. `timeout`: seconds after which a collective counts as hung.
    `around` puts another stepper around the one that does real backward passes. Raises UsageError for options that a run of
    `steps` could not honour: a longer warm-up or profile, an early stop without a judge or without evaluations enough.

    >>> trainer = Trainer(model, source, objective, folder="runs/mine", steps=1000)
    >>> trainer.fit()
    'completed'
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        objective: Objective,
        *,
        folder: str | Path,
        steps: int,
        seed: int = 0,
        optim: OptimConfig | None = None,
        schedule: ScheduleConfig | None = None,
        spike: SpikeConfig | None = None,
        checkpoint: CheckpointConfig | None = None,
        strategy: Strategy | None = None,
        weights: Weights | None = None,
        judge: Callable[[nn.Module], Judge] | None = None,
        eval_every: int = 500,
        early_stop: EarlyStop | None = None,
        monitors: Sequence[Monitor] = (),
        layer_gradients: int = 10,
        profile: ProfileConfig | None = None,
        facts: Mapping[str, Any] | None = None,
        flops_per_token: Callable[[int | None], float] | None = None,
        peak_flops: float | None = None,
        config_text: str | None = None,
        assets: Callable[[Path], None] | None = None,
        settled: Mapping[str, str] | None = None,
        split: int = 1,
        timeout: int = 300,
        around: Callable[[BackwardStepper], Stepper] | None = None,
    ):
        optim = optim or OptimConfig()
        self.checkpoint = checkpoint or CheckpointConfig()
        settings = StepSettings(
            steps=steps,
            lr=optim.lr,
            schedule=schedule or ScheduleConfig(),
            spike=spike or SpikeConfig(),
            clip=optim.clip,
            layer_gradients=layer_gradients,
        )
        lengths = LoopSettings(
            steps=steps,
            eval_every=eval_every,
            save_every=self.checkpoint.every,
            patience=early_stop.patience if early_stop else None,
            min_delta=early_stop.min_delta if early_stop else 0.0,
        )
        if profile is not None and profile.bounds()[1] > steps:
            raise UsageError(f"profile.steps = {profile.steps!r}: the run has only {steps} steps")
        self.model, self.source, self.folder = model, source, RunFolder(Path(folder))
        self.strategy: Strategy = strategy or Single(detect().device)
        self.ranks = self.strategy.ranks
        self.seed = seed
        self.config_text, self.assets, self.settled = config_text, assets, dict(settled or {})
        self.unwrapped = Root(model, objective)
        self.root = self.strategy.prepare(self.unwrapped, optim, weights)
        self.recorder: RunRecorder | Bystander = Bystander(dict(facts or {}))
        if self.ranks.rank == 0:
            self.recorder = RunRecorder(self.folder, monitors, dict(facts or {}), flops_per_token, peak_flops)
        backward = BackwardStepper(self.root, objective, self.strategy, settings, self.recorder.event, split)
        self.stepper: Stepper = around(backward) if around else backward
        self.loop = Loop(
            self.stepper,
            source,
            lengths,
            self.recorder,
            self._save,
            lambda: self.checkpoints.poll(),
            judge(self.root) if judge else None,
            StepProfiler(profile, self.folder.profile, self.ranks.device) if profile and self.ranks.rank == 0 else None,
            lambda: self.ranks.set_timeout(timeout),
            self.strategy.full_params,
        )

    def fit(self, stop: StopSignal | None = None) -> Outcome:
        """Train to the end, or on from the newest good checkpoint. Raises ScaleError with one line if it cannot.

        `stop`: the signals of a process that hears them from its start; without it they are heard while this runs.
        """
        stop = stop or StopSignal()
        outcome: Outcome | None = None
        error: BaseException | None = None
        with guarded_output(goes_on=True), ExitStack() as held, stop.training(self.ranks, stop_file()):
            try:
                with lost_peers_in_one_line(), dead_workers_in_one_line():
                    self.ranks.barrier()  # a rank that was stopped on its way here is missed before anything is written
                    self.ranks.lead(lambda: self._begin(held))
                    outcome = self._train(stop)
                return outcome
            except BaseException as raised:
                error = raised
                raise
            finally:
                try:
                    self._let_the_last_save_end(error)
                finally:
                    self.recorder.close(outcome, error)

    def _train(self, stop: StopSignal) -> Outcome:
        kept = self.checkpoint
        self.checkpoints = Checkpoints(
            self.folder.checkpoints, kept.keep_last, kept.keep_best, self._checkpoint_event, self.ranks
        )
        self._resume()
        self.ranks.lead(self._write_config)
        self.recorder.start(self.loop.settings.steps, self.loop.done)
        if self.loop.done < self.loop.settings.steps:
            if self.loop.stopped(stop):  # resuming and rehearsing take minutes each
                return "stopped"
            self.stepper.rehearse(self.source)
        outcome = self.loop.run(stop)
        self.checkpoints.wait()
        self.ranks.barrier()  # a rank that left early would look lost to those still writing
        return outcome

    def parts(self) -> dict[str, Stateful]:
        """Everything beside tensors and random generators that a checkpoint holds."""
        return {"loop": self.loop, "stepper": self.stepper, "source": self.source, "metrics": self.recorder}

    def _begin(self, held: ExitStack) -> None:
        """Lock the run folder for as long as `held` is open; run state, config and assets into it, each complete or absent,
        whenever the process dies."""
        held.enter_context(self.folder.lock())
        newest = newest_record(self.folder.checkpoints)
        record = newest[1] if newest else {}
        self.recorder.open(self.config_text, record)
        if newest is None:  # a run with checkpoints keeps its config until it was resumed: it may be refused
            self._write_config()
        if self.assets is not None:
            mended = write_sealed(self.folder.model, self.assets, record.get("model"))
            if mended is not None:
                self.recorder.event("mended", mended)

    def _write_config(self) -> None:
        if self.config_text is not None:
            write_atomic(self.folder.config, self.config_text)

    def _checkpoint_event(self, text: str) -> None:
        self.recorder.event("checkpoint", text)

    def _let_the_last_save_end(self, error: BaseException | None) -> None:
        """Before the lock goes: the next process removes what looks half-written. Its error is told by `wait` or not at
        all, as another one is on its way up. A save whose ranks are gone never ends."""
        seconds = None if self.ranks.world_size == 1 or error is None else DYING_SAVE_SECONDS
        if isinstance(error, KeyboardInterrupt):
            seconds = INTERRUPTED_SAVE_SECONDS
        if hasattr(self, "checkpoints"):
            with suppress(ScaleError):
                self.checkpoints.wait(seconds)

    def _save(self, step: int, val_loss: float | None) -> None:
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"rng": self.ranks.gather(rng_state()), "settled": self.settled}
        self.checkpoints.save(
            step, self.strategy.tensors() | self.stepper.tensors(), state, val_loss, self.recorder.record()
        )

    def _resume(self) -> None:
        saved = self.checkpoints.latest_good()
        if saved is None:
            self._seed(0)
            self.ranks.lead(self.recorder.fresh)
            return
        state = saved.state()
        rng, settled = state.pop("rng"), state.pop("settled")
        self.ranks.each(lambda: self._same_choices(settled))
        parts = self.parts()
        if state.keys() != parts.keys():
            raise ScaleError(f"{saved.path}: holds the state of {sorted(state)}, this run needs {sorted(parts)}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.ranks.lead(lambda: self.recorder.resumed(saved.step, saved.path, saved.record()))
        tensors = self.ranks.each(lambda: self._read(saved))
        self.strategy.restore({name: t for name, t in tensors.items() if not name.startswith(PREDICTION)})
        self.stepper.restore({name: t for name, t in tensors.items() if name.startswith(PREDICTION)})
        if len(rng) == self.ranks.world_size:
            load_rng_state(rng[self.ranks.rank])
        else:
            self._seed(saved.step)
            self.recorder.event(
                "resume", f"{len(rng)} ranks before, {self.ranks.world_size} now: random numbers start anew"
            )

    def _read(self, saved: Saved) -> dict[str, Tensor]:
        shapes = saved.shapes()
        tensors = self.strategy.blank({name: s for name, s in shapes.items() if not name.startswith(PREDICTION)})
        tensors |= self.stepper.blank({name: s for name, s in shapes.items() if name.startswith(PREDICTION)})
        saved.read(tensors)
        return tensors

    def _same_choices(self, settled: Mapping[str, str]) -> None:
        for key in settled.keys() & self.settled.keys():
            if settled[key] != self.settled[key]:
                raise UsageError(
                    f"{key} = 'auto': was {settled[key]} when the run was started and would be {self.settled[key]} here: "
                    f"add {key}={settled[key]} --allow-change {key}"
                )

    def _seed(self, step: int) -> None:
        """Dropout and the like: other numbers on every rank."""
        seed_all((self.seed + 1_000_003 * self.ranks.rank + 7_919 * step) % 2**31)
