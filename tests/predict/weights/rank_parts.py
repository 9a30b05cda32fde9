"""A small language model that is trained, observed, moved and put back, the same under every strategy."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
import torch.distributed.checkpoint as dcp

from scale.config.optim import ScheduleConfig
from scale.config.run import DeepSpeedConfig, FsdpConfig
from scale.parallel import companions
from scale.parallel.fsdp import Fsdp
from scale.parallel.single import Single
from scale.parallel.zero import DeepSpeed
from scale.predict.kinds import KINDS
from scale.predict.weights.jump import Jump
from scale.predict.weights.statistics import StatisticsHook
from tests.parallel.lm import Rows, digests, meta_model, prepared, whole_loss

DIRECTIONS = ("optimizer", "masked_slope")
OPTIM = {"lr": 3e-3, "eps": 1e-4}  # gradients near zero do not decide by their sign
STEPS = 20
"""Enough for every direction to say something, and for a reading in the last one."""


def strategy_of(ranks, kind):
    made = {
        "single": lambda: Single(),
        "fsdp": lambda: Fsdp(ranks, FsdpConfig()),
        "hsdp": lambda: Fsdp(ranks, FsdpConfig(shard=1)),
        "zero2": lambda: DeepSpeed(ranks, DeepSpeedConfig(stage=2)),
        "zero3": lambda: DeepSpeed(ranks, DeepSpeedConfig(stage=3)),
    }
    return made[kind]()


class Run:
    """Training with or without statistics."""

    def __init__(self, strategy, directions=None):
        self.strategy, self.ranks = strategy, strategy.ranks
        self.stepper = prepared(strategy, *meta_model(), OPTIM)
        self.stepper.settings = replace(self.stepper.settings, schedule=ScheduleConfig(kind="cosine", warmup=3))
        self.source = Rows(self.ranks.rank, self.ranks.world_size)
        self.hook = None
        if directions is not None:
            with strategy.edit_masters() as shards:
                self.hook = StatisticsHook(self.ranks, shards, directions)
            self.hook.carry.every, self.hook.carry.span = 2, 6
            self._add_hook()

    def _add_hook(self):
        plain = self.strategy.update

        def update(lr_factor, max_norm, observe, veto):
            self.hook.begin(self.stepper.steps_done + 1)
            done = plain(lr_factor, max_norm, self.hook, veto)
            self.hook.moved(lr_factor)
            return done

        self.strategy.update = update

    def train(self, steps):
        return [self.stepper.step(self.source).loss for _ in range(steps)]

    def seen(self):
        """The last statistics and reading, and products of all directions, over all ranks."""
        products = {}
        for name, direction in self.hook.directions.items():
            vectors = direction.vectors()
            assert vectors is not None, f"{name} has nothing to say"
            table = self.hook.sums.encode(vectors, None, self.hook.smoothed.vectors(), None)
            products[name] = self.hook.sums.whole([table])[0][:, [0, 2]].tolist()
        table, reading = self.hook.last.table_GC.tolist(), self.hook.carry.last
        return {"table": table, "elements": self.hook.last.elements_G.tolist(), "carry": reading, "products": products}

    def save(self, folder):
        with self.strategy.edit_masters() as shards:
            beside = companions.canonical(self.ranks, shards, self.hook.tensors())
        dcp.save(self.strategy.tensors() | beside, checkpoint_id=folder)
        return json.dumps(self.hook.state_dict())

    def load(self, folder, state, drawn):
        metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        saved = {name: entry.size for name, entry in metadata.items()}
        room = self.strategy.blank(saved) | companions.blank(self.ranks, saved)
        dcp.load(room, checkpoint_id=folder)
        self.strategy.restore(room)
        self.hook.load_state_dict(json.loads(state))
        with self.strategy.edit_masters() as shards:
            companions.restore(self.ranks, shards, room, self.hook.tensors())
        self.stepper.steps_done = self.source.drawn = drawn


def bits(run):
    """Everything that must be equal to the last bit."""
    local = {k: {n: t.tolist() for n, t in tensors.items()} for k, tensors in run.hook.tensors().items()}
    return [json.dumps(run.seen()), json.dumps(run.hook.state_dict()), digests(run.strategy), json.dumps(local)]


def jump(run, c=15.0):
    """Forward losses before, after a jump, after taking it back, and what became of the weights."""
    mover, before = Jump(run.strategy), digests(run.strategy)
    losses = [whole_loss(run.stepper.root)]
    mover.snapshot()
    untouched = digests(run.strategy) == before
    mover.apply(run.hook.smoothed.vectors(), [c] * len(KINDS), seed=1)
    losses.append(whole_loss(run.stepper.root))
    drift, moved = mover.drift(), digests(run.strategy)
    mover.rollback()
    losses.append(whole_loss(run.stepper.root))
    mover.apply(run.hook.smoothed.vectors(), [c] * len(KINDS), seed=1)
    again = digests(run.strategy)
    mover.rollback()
    return {
        "losses": losses, "drift": drift, "back": digests(run.strategy) == before, "zero": mover.drift(),
        "moved": sum(moved[name] != before[name] for name in before) / len(before), "again": again == moved,
        "untouched": untouched, "digests": moved,
    }  # fmt: skip


def story(ranks, kind, folder):
    """Observed or not, jumped and back, saved and resumed."""
    run, plain = Run(strategy_of(ranks, kind), DIRECTIONS), Run(strategy_of(ranks, kind))
    losses = [run.train(STEPS), plain.train(STEPS)]
    same = digests(run.strategy) == digests(plain.strategy)
    seen, jumped = run.seen(), jump(run)
    state = run.save(folder)
    resumed = Run(strategy_of(ranks, kind), DIRECTIONS)
    resumed.load(folder, state, STEPS)
    before = bits(run) == bits(resumed)
    losses += [run.train(5), plain.train(5), resumed.train(5)]
    return {"losses": losses, "same": same, "seen": seen, "jump": jumped, "resumed": [before, bits(run) == bits(resumed)],
            "state": state, "parts": parts(run)}  # fmt: skip


def parts(run):
    """Where this rank's shards lie."""
    with run.strategy.edit_masters() as shards:
        return {name: [s.offset, list(s.param.shape), s.copies] for name, s in shards.items()}


def continued(ranks, folder, state, kind="single"):
    """One process takes up what two left: its statistics beside the checkpoint, and the next losses."""
    run = Run(strategy_of(ranks, kind), DIRECTIONS)
    run.load(folder, state, STEPS)
    held = {f"predict/{k}/{n}": t for k, tensors in run.hook.tensors().items() for n, t in tensors.items()}
    whole = {key: torch.zeros(tensor.shape) for key, tensor in held.items()}
    dcp.load(whole, checkpoint_id=folder, no_dist=True)
    same = all(torch.equal(whole[key], held[key]) for key in held)
    return {"same": same, "seen": run.seen(), "losses": run.train(5)}
