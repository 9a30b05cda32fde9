"""A small language model under the predictive stepper, jumping, with every jump measured from outside."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

from scale.config.optim import ScheduleConfig
from scale.config.predict import PredictConfig
from scale.predict.controller import Decision
from scale.predict.kinds import KINDS, kind_of
from scale.predict.stepper import PredictiveStepper
from scale.train.observe import layer_of
from tests.parallel.lm import Rows, meta_model, prepared
from tests.predict.weights.rank_parts import OPTIM, strategy_of

STEPS = 40
BASE = {
    "enabled": True, "warmup": 6, "min_full": 3, "horizons": [5, 9], "coefficients": "line", "confidence": 0,
    "directions": ["optimizer"], "world": {"members": 1, "hidden": 4, "latent": 2, "train_every": 5, "paths": 2, "bptt": 4},
    "guard": {"correction_interval": 3, "settle_steps": 2},
}  # fmt: skip
EPS = 2.0**-23


class Run:
    """Training under a strategy, and a note of what every climb did to the weights of this rank."""

    def __init__(self, ranks, kind, **predict):
        self.strategy = strategy_of(ranks, kind)
        full = prepared(self.strategy, *meta_model(), OPTIM)
        full.settings = replace(full.settings, steps=STEPS, schedule=ScheduleConfig(kind="cosine", warmup=3))
        self.stepper = PredictiveStepper(full, PredictConfig(**(BASE | predict)))
        self.source = Rows(ranks.rank, ranks.world_size)
        self.cycle, self.climbs, self.heights = self.stepper.cycle, [], None
        # another share of the line for every kind of weights
        self.stepper.controller._share = lambda k, forecast: [0.2 + 0.05 * g for g in range(len(KINDS))]
        self._jump, self._check = self.cycle._in_parts, self.cycle.check.loss
        self.cycle._in_parts = self._measured
        self.cycle.check.loss = self._loss

    def _loss(self):
        """The check loss, or the next of planted ones."""
        real = self._check()
        return real if self.heights is None else self.heights.pop(0)

    def masters(self):
        with self.strategy.edit_masters() as shards:
            return {name: shard.param.detach().clone() for name, shard in shards.items()}

    def bits(self):
        """Of this rank's masters."""
        return {n: hashlib.sha256(p.numpy().tobytes()).hexdigest() for n, p in self.masters().items()}

    def moments(self):
        """Of the optimizer, all names that this rank owns."""
        tensors = {n: t for n, t in self.strategy.tensors().items() if n.startswith("optim/")}
        local = {n: getattr(t, "_local_tensor", t).contiguous() for n, t in tensors.items()}
        return {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in local.items()}

    def forward(self):
        """What the next forward passes see."""
        return self.stepper.full.score(self.cycle.check.group)

    def _measured(self, decision, before, seed):
        vectors = self.stepper.hook.directions[decision.direction].vectors()
        lines = {n: v.double().clone() for n, v in zip(self.stepper.hook.names, vectors, strict=True)}
        start, bits, moments, seen = self.masters(), self.bits(), self.moments(), self.forward()
        factors = dict(zip(self.cycle.jump.places, decision.factor_P, strict=True))
        found = self._jump(decision, before, seed)
        worst, moved = 0.0, 0.0
        for name, end in self.masters().items():
            if not end.numel():
                continue
            g = kind_of(name)
            factor = factors[KINDS[g], layer_of(name)]
            steps = [c_G[g] * factor * lines[name] for c_G in found.parts]
            expected = start[name].double() + sum(steps)
            room = (start[name].double().abs() + sum(abs(step) for step in steps)) * EPS * (1 + len(steps))
            worst = max(worst, float(((end.double() - expected).abs() / (room + 1e-30)).max()))
            moved = max(moved, float((end.double() - start[name].double()).abs().max()))
        self.climbs.append({
            "kept": found.steps, "parts": found.parts, "worst": worst, "moved": moved, "same": self.bits() == bits,
            "moments": self.moments() == moments, "forward": [seen, self.forward()], "rejected": found.rejected,
            "before": before, "after": found.after, "reach": decision.reach_KG,
        })  # fmt: skip
        return found

    def train(self, steps):
        """What was said of each step; losses apart."""
        return [self.stepper.step(self.source) for _ in range(steps)]

    def until(self, phase):
        """Step until a phase has begun."""
        for _ in range(STEPS):
            if self.stepper.cycle.phase == phase:
                return
            self.train(1)
        raise AssertionError(f"phase {phase} never came")


def always(ranks, kind):
    """A whole run that jumps wherever it may."""
    run = Run(ranks, kind, mode="always")
    reports = []
    while run.stepper.full.steps_done < STEPS:
        reports += run.train(1)
    counts = run.stepper.ledger.counts()
    counts.pop("divergences")  # rank 0's
    return {
        "kinds": [r.kind for r in reports], "losses": [r.loss for r in reports if r.kind != "predict"],
        "said": [r.prediction["phase"] for r in reports], "climbs": run.climbs, "ledger": counts,
        "forwards": [r.forward_passes for r in reports], "drawn": run.source.drawn,
    }  # fmt: skip


def rejected(ranks, kind):
    """Jumps that a planted check finds worse, always."""
    run = Run(ranks, kind, mode="always")
    run.heights = [float(n) for n in range(100)]
    reports = run.train(16)
    ledger = run.stepper.ledger
    return {"climbs": run.climbs, "kinds": [r.kind for r in reports], "wait": run.stepper.cycle.wait,
            "counts": [ledger.attempts, ledger.accepted, ledger.predicted]}  # fmt: skip


def taken_back(ranks, kind):
    """Parts that are refused after others were kept: what is kept is what the kept parts alone give."""
    out = []
    for heights in ([9.0, 8.0, 8.5, 8.5], [9.0, 8.0, 8.5, 7.0, 7.5], [9.0, float("nan"), 8.0, 9.0]):
        run = Run(ranks, kind, mode="always", horizons=[9])
        run.heights = [*heights, *([100.0] * 20)]
        run.until("settle")
        (climb,) = run.climbs
        # ready weights differ from those of the climb by the full step after it: go back to the jump alone
        out.append({"kept": climb["kept"], "parts": climb["parts"], "reach": climb["reach"], "worst": climb["worst"],
                    "before": climb["before"]})  # fmt: skip
    return out


def kept_alone(ranks, kind):
    """A climb of which the second part is taken back, against a climb that makes the first part only."""
    run = Run(ranks, kind, mode="observe")
    run.train(8)
    run.cycle.check.draw(run.source)
    factors = [run.stepper.full.factor(step) for step in range(9, 18)]
    reach = run.stepper.controller._reach(9, factors, None)
    factors = [1 + 0.1 * p for p in range(len(run.cycle.jump.places))]
    decision = along_update(reach, factors)
    start = run.bits()
    run.heights = [8.0, 8.5, 8.5]
    found = run._jump(decision, 9.0, 7)
    left, seen = run.bits(), run.forward()
    run.cycle.jump.rollback()
    back = run.bits() == start
    run.heights = [8.0]
    alone = run._jump(along_update(reach[:3], factors), 9.0, 7)
    return {"same": run.bits() == left != start, "seen": [seen, run.forward()], "back": back,
            "kept": [found.steps, alone.steps], "parts": [found.parts, alone.parts]}  # fmt: skip


def along_update(reach_KG, factor_P):
    """A jump."""
    return Decision("optimizer", len(reach_KG), len(reach_KG), reach_KG, None, None, [], factor_P, None, None, [])


def undone(ranks, kind):
    """A jump that its acceptance test finds worse is undone; the optimizer goes on from where it is."""
    run = Run(ranks, kind, mode="auto")
    starts, ends = [], []
    start, undo = run.cycle.try_jump, run.cycle._undo

    def started(*arguments):
        starts[:] = [run.bits()]
        return start(*arguments)

    def undoing(report):
        moments = run.moments()
        settled = run.bits()
        undo(report)
        ends.append({"back": run.bits() == starts[0] != settled, "moments": run.moments() == moments})

    run.cycle.try_jump, run.cycle._undo = started, undoing
    run.until("settle")
    run.heights = [100.0]
    (last,) = run.train(1)
    assert run.stepper.cycle.phase == "full"
    run.heights = None
    seen = run.forward()
    later = run.train(4)
    counts = run.stepper.ledger.counts()
    return {"ends": ends, "said": last.prediction["undone"], "counts": [counts["accepted"], counts["predicted"]],
            "rejected": counts["rejected"], "kept": run.climbs[-1]["kept"], "kinds": [r.kind for r in later],
            "forward": [run.climbs[-1]["forward"][0], seen]}  # fmt: skip


def story(ranks, kind):
    """Everything, as JSON."""
    out = {"always": always(ranks, kind), "rejected": rejected(ranks, kind), "undone": undone(ranks, kind)}
    out |= {"taken back": taken_back(ranks, kind), "alone": kept_alone(ranks, kind)}
    return json.loads(json.dumps(out, default=asdict))
