"""What is shown of prediction before training starts."""

from __future__ import annotations

from scale.config.predict import PredictConfig
from scale.predict.weights.memory import ON_CPU, footprint, on_device

MIB = 2**20


def predict_facts(config: PredictConfig, numel: int, steps: int) -> dict[str, str]:
    """One line each on how jumps are made, judged and chosen, and on what they keep. `numel`: trainable parameters on one
    device; `steps` of the run, in which something may never happen. Nothing where prediction is off."""
    if not config.enabled:
        return {}
    fixed = "" if config.fixed is None else f" {config.fixed:g}"
    least = f"confidence {config.confidence:g} or more" if config.confidence else "any confidence"
    facts = {
        "prediction": f"mode {config.mode}, use {config.use}, preset {config.preset}, costs {config.costs}",
        "prediction directions": ", ".join(config.directions),
        "prediction horizons": f"{', '.join(map(str, config.horizons))} steps, {least}",
        "prediction coefficients": f"{config.coefficients}{fixed}",
        "prediction warm-up": f"{config.warmup} full steps, then {config.min_full} or more between jumps",
    }
    guard = config.guard
    if config.strides and config.mode != "observe":
        facts["prediction strides"] = (
            f"{config.strides} full steps carried on, {guard.relax} to relax, then one verdict"
        )
    if config.mode != "observe":
        credit = "measured worth" if config.mode == "auto" else "length"
        facts["prediction credit"] = f"{guard.credit:.0%} of the {credit}"
        needed = config.warmup + config.min_full + config.strides + guard.relax + 1
        if needed >= steps:
            facts["prediction credit"] = (
                f"none: the first jump that can be judged needs more than {needed} of {steps} steps"
            )
    if config.stop_below is not None:
        facts["prediction ends the run"] = (
            f"once the weights beside it have a check loss of {config.stop_below:g} or less"
        )
    if config.selection.kind != "off":
        selection = config.selection
        kept = f"{selection.keep:.0%} of the candidates kept"
        if selection.control == "bandit":
            shares = ", ".join(f"{share:.0%}" for share in (*selection.arms, 1.0))
            kept = f"{shares} of the candidates, chosen in episodes of {selection.episode} steps"
        begins = "never: the run is shorter" if selection.warmup >= steps else "whole windows of rows later"
        after = f", after {selection.warmup} batches ({begins})" if selection.warmup else ""
        facts["selection of documents"] = f"{selection.kind}, {kept}{after}"
    return facts | {"memory prediction (for one device)": _memory(config, numel)}


def _memory(config: PredictConfig, numel: int) -> str:
    parts = footprint(numel, config.directions, config.guard.offload, config.use)
    shown = ", ".join(f"{what} {size / MIB:,.1f}" for what, size in parts.items() if size and what != ON_CPU)
    beside = f"; {ON_CPU} {parts[ON_CPU] / MIB:,.1f}" if ON_CPU in parts else ""
    return f"{on_device(parts) / MIB:,.1f} MiB ({shown}{beside})"
