"""Configs that an earlier version wrote into run folders, in today's words; and what a person who uses old words is told."""

from __future__ import annotations

import copy

import pytest

from scale.config import load_config, parse_config, stored_config, to_yaml
from scale.config.yamlfile import parse_yaml, write_yaml
from scale.errors import UsageError
from tests.conftest import tiny_run

OLD_GUARD = {
    "tokens": 0, "correction_interval": 4, "growth": 1.0, "tolerance": 0.1, "relax": 3, "credit": 0.5, "drift": 9.0,
    "offload": False, "memory": None,
}  # fmt: skip
OLD = {
    "enabled": True, "mode": "always", "use": "adopt", "stop_below": None, "preset": "balanced", "warmup": 40, "min_full": 1,
    "horizons": [3], "directions": ["optimizer"], "strides": 32, "coefficients": "last", "fixed": None, "confidence": 0.0,
    "sigma": 2.5, "costs": "flops", "every": 1, "guard": OLD_GUARD, "seed": 0,
    "selection": {"kind": "world", "keep": 0.5, "control": "fixed", "shares": [], "episode": 48, "warmup": 150},
}  # fmt: skip
"""The section as resolved configs of version 0.1 hold it."""


def stored(tmp_path, predict):
    """The resolved config of a run, with that section in it."""
    path = tmp_path / "run.yaml"
    path.write_text(write_yaml(tiny_run(tmp_path)), encoding="utf-8")
    content, _ = parse_yaml(to_yaml(load_config(path)), path)
    path.write_text(write_yaml({**content, "predict": predict}), encoding="utf-8")
    return path


def test_a_stored_config_is_read_in_todays_words(tmp_path):
    path = stored(tmp_path, OLD)
    for config in (stored_config(path), parse_config(path.read_text(encoding="utf-8"), path)):
        predict = config.predict
        assert (predict.extrapolation_steps, predict.extrapolation_ratio, predict.coefficients) == (32, 3, "line")
        assert (predict.guard.settle_steps, predict.guard.discount, predict.guard.drift) == (3, 0.5, 9.0)
        assert (predict.selection.kind, predict.selection.warmup, predict.warmup) == ("regression", 150, 40)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"coefficients": "fixed", "fixed": 0.5, "strides": 0}, ("line", 0.5, ("optimizer",), 0)),
        (
            {"coefficients": "world", "strides": 0, "directions": ["drift", "masked_slope"]},
            ("world", 1, ("masked_slope",), 0),
        ),
        ({"coefficients": "world", "strides": 0, "directions": ["drift"]}, ("world", 1, ("optimizer",), 0)),
    ],
)
def test_settings_of_prediction_are_carried_over(tmp_path, old, new):
    found = stored_config(stored(tmp_path, OLD | old)).predict
    assert (found.coefficients, found.share, found.directions, found.extrapolation_steps) == new


def test_where_prediction_was_off_nothing_of_it_is_left(tmp_path):
    before = copy.deepcopy(OLD)
    config = stored_config(stored(tmp_path, OLD | {"enabled": False, "directions": ["drift", "window"]}))
    assert config.predict == load_config(stored(tmp_path, {})).predict and before == OLD


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("predict.guard.relax=3", "is called predict.guard.settle_steps now"),
        ("predict.selection.kind=world", "is called 'regression' now"),
        ("predict.coefficients=last", "is called 'line' now"),
        ("predict.directions=[drift]", "was removed: no direction beat the last update"),
        ("predict.costs=flops", "was removed: a forward pass always counts as a third of a step"),
    ],
)
def test_a_person_is_told_what_became_of_old_words(tmp_path, override, told):
    with pytest.raises(UsageError) as found:
        load_config(stored(tmp_path, {}), [override])
    assert told in str(found.value) and "\n" not in str(found.value)
