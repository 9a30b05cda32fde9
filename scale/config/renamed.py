"""Keys that a config had under another name, or no longer has: refused with what to write instead."""

from __future__ import annotations

RENAMED = {
    "predict.guard.relax": "predict.guard.settle_steps",
    "predict.guard.credit": "predict.guard.discount",
    "predict.strides": "predict.extrapolation_steps (and predict.extrapolation_ratio, which was predict.horizons)",
    "predict.fixed": "predict.share (with predict.coefficients=line)",
}
REMOVED = {
    "predict.use": "weights beside training gained nothing over training's own",
    "predict.stop_below": "it looked at the weights of predict.use=shadow, which was removed too",
    "predict.costs": "a forward pass always counts as a third of a step",
    "predict.guard.offload": "snapshots stay on the device",
    "predict.guard.memory": "`scale train --dry-run` and `scale plan` show what prediction keeps",
    "predict.selection.control": "predict.selection.keep holds throughout",
    "predict.selection.shares": "predict.selection.keep holds throughout",
    "predict.selection.episode": "predict.selection.keep holds throughout",
}


def what_became_of(key: str) -> str | None:
    """Of a key that is unknown today; None if it never was one."""
    if key in RENAMED:
        return f"is called {RENAMED[key]} now"
    return f"was removed: {REMOVED[key]}" if key in REMOVED else None
