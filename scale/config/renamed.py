"""Keys that a config had under another name, or no longer has: refused with what to write instead."""

from __future__ import annotations

from typing import Any

RENAMED = {
    "predict.guard.relax": "predict.guard.settle_steps",
    "predict.guard.credit": "predict.guard.discount",
    "predict.strides": "predict.extrapolation_steps (with predict.extrapolation_ratio for what horizons said beside strides)",
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


VALUES = {
    ("predict.selection.kind", "world"): "is called 'regression' now",
    ("predict.coefficients", "last"): "is called 'line' now (with predict.directions=[optimizer])",
    ("predict.coefficients", "fixed"): "is called 'line' now, with predict.share",
    ("predict.directions", "drift"): "was removed: no direction beat the last update ('optimizer')",
    ("predict.directions", "window"): "was removed: no direction beat the last update ('optimizer')",
    ("predict.directions", "singular"): "was removed: no direction beat the last update ('optimizer')",
}


def what_became_of_value(key: str, value: object) -> str | None:
    """Of a value that is unknown today; None if it never was one. Numbers of list entries in `key` do not count."""
    return VALUES.get((".".join(part for part in key.split(".") if not part.isdigit()), str(value)))


def in_todays_words(content: dict[str, Any]) -> dict[str, Any]:
    """A resolved config that an earlier version wrote into a run folder. Settings of prediction are carried over where there is
    prediction; otherwise nobody read them."""
    old = content.get("predict")
    if not isinstance(old, dict) or not any(f"predict.{key}" in {**RENAMED, **REMOVED} for key in old):
        return content
    if not old.get("enabled"):
        return {key: value for key, value in content.items() if key != "predict"}
    new = {key: value for key, value in old.items() if f"predict.{key}" not in {**RENAMED, **REMOVED}}
    new["coefficients"] = {"last": "line", "fixed": "line"}.get(old.get("coefficients", "world"), old["coefficients"])
    new["share"] = old.get("fixed") or 1.0
    new["directions"] = [name for name in old.get("directions", []) if name in ("optimizer", "masked_slope")] or [
        "optimizer"
    ]
    new["extrapolation_steps"] = old.get("strides", 0)
    if old.get("strides"):
        new["extrapolation_ratio"] = old["horizons"][0]
    for section in ("guard", "selection"):
        given = old.get(section) or {}
        here = {RENAMED.get(f"predict.{section}.{k}", f"predict.{section}.{k}"): v for k, v in given.items()}
        new[section] = {key.rpartition(".")[2]: value for key, value in here.items() if key not in REMOVED}
    if new["selection"].get("kind") == "world":
        new["selection"]["kind"] = "regression"
    return {**content, "predict": new}


def what_became_of(key: str) -> str | None:
    """Of a key that is unknown today; None if it never was one."""
    if key in RENAMED:
        return f"is called {RENAMED[key]} now"
    return f"was removed: {REMOVED[key]}" if key in REMOVED else None
