"""Bad values of the section through the real command: one line with value, place and fix; nothing stays."""

from __future__ import annotations

import pytest

from tests.refusal import Home, Refuse


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield Home(tmp_path_factory.mktemp("home"))


CASES = {
    "unknown direction": (
        {"predict.directions": ["optimiser"]},
        ["predict.directions.0 = 'optimiser'", "expected 'optimizer'", "did you mean optimizer?"]),
    "direction twice": ({"predict.directions": ["optimizer", "optimizer"]}, ["predict", "name each one once"]),
    "no directions": ({"predict.directions": []}, ["predict.directions = []", "needs 1 or more entries, has 0"]),
    "no horizons": ({"predict.horizons": []}, ["predict.horizons = []", "needs 1 or more entries, has 0"]),
    "horizon of no step": ({"predict.horizons": [0]}, ["predict.horizons.0 = 0", "greater than 0"]),
    "a share of what is no line": ({"predict.share": 0.5}, ["predict", "share = 0.5: read with coefficients = 'line' only"]),
    "unknown key": ({"predict.guard.drfit": 3}, ["predict.guard.drfit = 3: unknown key", "predict.guard.drift"]),
    "unknown mode": ({"predict.mode": "dream"}, ["predict.mode = 'dream'", "'auto', 'always' or 'observe'"]),
    "too many horizons": (
        {"predict.horizons": [*range(1, 10)]}, ["predict.horizons", "needs 8 or fewer entries, has 9"]),
    "extrapolation along another direction": (
        {"predict.extrapolation_steps": 4, "predict.coefficients": "line"},
        ["extrapolation_steps = 4: repeats the update just made: needs directions = ['optimizer']"]),
    "weights of documents that nobody chooses": (
        {"predict.selection": {"unbiased": True}}, ["selection.unbiased = true", "it is 'off'"]),
    "next to no documents": (
        {"predict.selection": {"kind": "history", "keep": 1e-9}}, ["predict.selection.keep = 1e-09", "0.01"]),
    "a memory shorter than a window": (
        {"predict.world": {"replay": 64, "bptt": 64}}, ["world.replay = 64", "world.bptt = 64"]),
    "all data held back": (
        {"predict.guard.tokens": 10**9}, ["predict.guard.tokens = 1,000,000,000", "training tokens would be held back"]),
    "no warm-up": ({"predict.warmup": 0}, ["predict.warmup = 0", "greater than 0"]),
    "a key that was renamed": (
        {"predict.guard.relax": 3}, ["predict.guard.relax = 3", "is called predict.guard.settle_steps now"]),
    "a key that was removed": ({"predict.use": "shadow"}, ["predict.use = 'shadow'", "was removed"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_values(name, home, tmp_path, capsys):
    changes, fragments = CASES[name]
    refuse = Refuse(home, tmp_path, capsys)
    refuse("train", home.write(tmp_path, {"predict.enabled": True} | changes), fragments=fragments)
