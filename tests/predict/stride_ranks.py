"""Training whose full steps are carried on, with every stride measured from outside."""

from __future__ import annotations

from tests.predict.jump_ranks import STEPS, Run

LONG, STRIDES, RELAX = 3, 4, 2
STRIDING = {
    "mode": "always", "directions": ["optimizer"], "coefficients": "last", "horizons": [LONG], "strides": STRIDES,
    "guard": {"correction_interval": 2, "relax": RELAX, "drift": 9.0, "tolerance": 0.5, "credit": 0.5},
}  # fmt: skip


def striding(ranks, kind, **changes):
    """A run, with the masters before each full step, after it and after it was carried on."""
    run = Run(ranks, kind, **(STRIDING | changes))
    run.seen = []
    full, stride = run.stepper.full.step, run.attempts.stride

    def step(source):
        run.before = run.masters()
        return full(source)

    def carried(lr_factor, last):
        after = run.masters()
        going_on = stride(lr_factor, last)
        run.seen.append((run.before, after, run.masters()))
        return going_on

    run.stepper.full.step, run.attempts.stride = step, carried
    return run


def worst(seen):
    """Largest distance of a weight from before + (1 + LONG) x update, in units of fp32 rounding; largest stride."""
    off, moved = 0.0, 0.0
    for before, after, end in seen:
        for name, start in before.items():
            if start.numel():
                update = after[name].double() - start.double()
                room = (start.double().abs() + 8 * LONG * update.abs()) * 2.0**-22 + 1e-30
                expected = start.double() + (1 + LONG) * update
                off = max(off, float(((end[name].double() - expected).abs() / room).max()))
                moved = max(moved, float((end[name] - after[name]).abs().max()))
    return off, moved


def story(ranks, kind):
    """A whole run, and one that is undone."""
    run = striding(ranks, kind)
    reports = []
    while run.stepper.full.steps_done < STEPS:
        reports += run.train(1)
    off, moved = worst(run.seen)
    counts = run.stepper.ledger.counts()
    counts.pop("divergences")  # rank 0's
    return {
        "off": off, "moved": moved, "strides": len(run.seen), "kinds": [r.kind for r in reports], "ledger": counts,
        "losses": [r.loss for r in reports if r.kind != "predict"], "said": [r.prediction["phase"] for r in reports],
        "credits": [r.prediction["credit"] for r in reports if "credit" in r.prediction], "drawn": run.source.drawn,
        "lengths": [[r.prediction["kept"], r.prediction["strides"]] for r in reports if "credit" in r.prediction],
        "undone": undone(ranks, kind),
    }  # fmt: skip


def undone(ranks, kind):
    """In mode auto, strides that the check after relaxing finds worse: the weights they began from, bit for bit."""
    run = striding(ranks, kind, mode="auto")
    starts, begin = [], run.attempts.begin_strides

    def begun(*arguments):
        starts[:] = [run.bits()]
        return begin(*arguments)

    run.attempts.begin_strides = begun
    run.until("stride")
    run.until("correct")
    run.heights = [100.0]
    while run.stepper.phases.phase == "correct":
        before = run.bits()
        (report,) = run.train(1)
    return {"back": run.bits() == starts[0] != before, "said": report.prediction["undone"],
            "rejected": run.stepper.ledger.rejected, "balance": run.attempts.account.balance}  # fmt: skip
