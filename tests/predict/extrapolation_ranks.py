"""Training whose updates are extrapolated, each one measured from outside."""

from __future__ import annotations

from tests.predict.jump_ranks import STEPS, Run

RATIO, STEPS_IN_ROW, SETTLE = 3, 4, 2
EXTRAPOLATING = {
    "mode": "always", "directions": ["optimizer"],
    "coefficients": "line", "extrapolation_ratio": RATIO, "extrapolation_steps": STEPS_IN_ROW,
    "guard": {"correction_interval": 2, "settle_steps": SETTLE, "drift": 9.0, "tolerance": 0.5, "discount": 0.5},
}  # fmt: skip


def extrapolating(ranks, kind, **changes):
    """A run, with the masters before each full step, after it and after its update was repeated."""
    run = Run(ranks, kind, **(EXTRAPOLATING | changes))
    run.seen = []
    full, extrapolate = run.stepper.full.step, run.cycle._extrapolate

    def step(source):
        run.before = run.masters()
        return full(source)

    def extrapolated(lr_factor):
        after = run.masters()
        going_on = extrapolate(lr_factor)
        run.seen.append((run.before, after, run.masters()))
        return going_on

    run.stepper.full.step, run.cycle._extrapolate = step, extrapolated
    return run


def worst(seen):
    """Largest distance of a weight from before + (1 + RATIO) x update, in units of fp32 rounding; largest repeated update."""
    off, moved = 0.0, 0.0
    for before, after, end in seen:
        for name, start in before.items():
            if start.numel():
                update = after[name].double() - start.double()
                room = (start.double().abs() + 8 * RATIO * update.abs()) * 2.0**-22 + 1e-30
                expected = start.double() + (1 + RATIO) * update
                off = max(off, float(((end[name].double() - expected).abs() / room).max()))
                moved = max(moved, float((end[name] - after[name]).abs().max()))
    return off, moved


def story(ranks, kind):
    """A whole run, and one that is undone."""
    run = extrapolating(ranks, kind)
    reports = []
    while run.stepper.full.steps_done < STEPS:
        reports += run.train(1)
    off, moved = worst(run.seen)
    counts = run.stepper.ledger.counts()
    counts.pop("divergences")  # rank 0's
    return {
        "off": off, "moved": moved, "extrapolated": len(run.seen), "kinds": [r.kind for r in reports], "ledger": counts,
        "losses": [r.loss for r in reports if r.kind != "predict"], "said": [r.prediction["phase"] for r in reports],
        "credits": [r.prediction["credited"] for r in reports if "credited" in r.prediction], "drawn": run.source.drawn,
        "lengths": [[r.prediction["kept"], r.prediction["extrapolated"]] for r in reports if "credited" in r.prediction],
        "undone": undone(ranks, kind),
    }  # fmt: skip


def undone(ranks, kind):
    """In mode auto, updates whose acceptance test finds them worse: the weights they began from, bit for bit."""
    run = extrapolating(ranks, kind, mode="auto")
    starts, begin = [], run.cycle.begin_extrapolation

    def begun(*arguments):
        starts[:] = [run.bits()]
        return begin(*arguments)

    run.cycle.begin_extrapolation = begun
    run.until("extrapolate")
    run.until("settle")
    run.heights = [100.0]
    while run.stepper.cycle.phase == "settle":
        before = run.bits()
        (report,) = run.train(1)
    return {"back": run.bits() == starts[0] != before, "said": report.prediction["undone"],
            "rejected": run.stepper.ledger.rejected, "balance": run.cycle.savings.balance}  # fmt: skip
