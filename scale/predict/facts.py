"""What is shown of prediction before training starts."""

from __future__ import annotations

from scale.config.predict import PredictConfig
from scale.predict.weights.memory import footprint

MIB = 2**20


def predict_facts(config: PredictConfig, numel: int, steps: int) -> dict[str, str]:
    """One line each on how jumps are made, tested and chosen, and on what they keep. `numel`: trainable parameters on one
    device; `steps` of the run, in which something may never happen. Nothing where prediction is off."""
    if not config.enabled:
        return {}
    share = "" if config.coefficients == "world" else f", {config.share:g} of it"
    least = f"confidence {config.confidence:g} or more" if config.confidence else "any confidence"
    facts = {
        "prediction": f"mode {config.mode}, preset {config.preset}",
        "prediction directions": ", ".join(config.directions),
        "prediction coefficients": f"{config.coefficients}{share}",
        "prediction warm-up": f"{config.warmup} full steps, then {config.min_full} or more between jumps",
    }
    guard = config.guard
    if config.extrapolation_steps and config.mode != "observe":
        facts["prediction extrapolation"] = (
            f"{config.extrapolation_steps} full steps, each repeated {config.extrapolation_ratio} times, {guard.settle_steps} "
            "to settle, then one acceptance test"
        )
    else:
        facts["prediction horizons"] = f"{', '.join(map(str, config.horizons))} steps, {least}"
    if config.mode != "observe":
        of = "steps it saved" if config.mode == "auto" else "length"
        facts["prediction credit"] = f"{guard.discount:.0%} of the {of}"
        decisions = 2 if config.mode == "auto" else 1  # the first one only measures the rate of full steps
        needed = config.warmup + decisions * config.min_full + config.extrapolation_steps + guard.settle_steps + 1
        if needed >= steps:
            facts["prediction credit"] = (
                f"none: the first jump that can be tested needs more than {needed} of {steps} steps"
            )
    selection = config.selection
    if selection.kind != "off":
        begins = "never: the run is shorter" if selection.warmup >= steps else "whole windows of rows later"
        after = f", after {selection.warmup} batches ({begins})" if selection.warmup else ""
        facts["selection of documents"] = f"{selection.kind}, {selection.keep:.0%} of the candidates kept{after}"
    parts = footprint(numel, config.directions)
    listed = ", ".join(f"{purpose} {size / MIB:,.1f}" for purpose, size in parts.items())
    return facts | {"memory prediction (for one device)": f"{sum(parts.values()) / MIB:,.1f} MiB ({listed})"}
