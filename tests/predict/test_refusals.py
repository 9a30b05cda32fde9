"""Bad values of the section through the real command: one line with value, place and fix; nothing stays."""

from __future__ import annotations

import pytest

from tests.distributed.harness import end, start_train
from tests.refusal import Home, Refuse


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield Home(tmp_path_factory.mktemp("home"))


CASES = {
    "unknown direction": (
        {"predict.directions": ["drft"]}, ["predict.directions.0 = 'drft'", "expected 'drift'", "did you mean drift?"]),
    "direction twice": ({"predict.directions": ["drift", "drift"]}, ["predict", "name each one once"]),
    "no directions": ({"predict.directions": []}, ["predict.directions = []", "needs 1 or more entries, has 0"]),
    "no horizons": ({"predict.horizons": []}, ["predict.horizons = []", "needs 1 or more entries, has 0"]),
    "horizon of no step": ({"predict.horizons": [0]}, ["predict.horizons.0 = 0", "greater than 0"]),
    "fixed without coefficients": (
        {"predict.fixed": 0.5}, ["predict", "fixed = 0.5 with coefficients = 'world'", "belong together"]),
    "coefficients without fixed": (
        {"predict.coefficients": "fixed"}, ["predict", "fixed = None with coefficients = 'fixed'"]),
    "too little memory": (
        {"predict.guard.memory": 1e-6}, ["predict.guard.memory = 1e-06", "prediction needs", "GiB", "raise it"]),
    "unknown key": ({"predict.guard.relx": 3}, ["predict.guard.relx = 3: unknown key", "predict.guard.relax"]),
    "unknown mode": ({"predict.mode": "dream"}, ["predict.mode = 'dream'", "'auto', 'always' or 'observe'"]),
    "too many horizons": (
        {"predict.horizons": [*range(1, 10)]}, ["predict.horizons", "needs 8 or fewer entries, has 9"]),
    "stopping by weights that nobody keeps": (
        {"predict.stop_below": 2.5}, ["predict", "stop_below = 2.5", "use = 'shadow'", "here use = 'adopt'"]),
    "stopping by weights that nobody tries": (
        {"predict.stop_below": 2.5, "predict.use": "shadow", "predict.mode": "observe"}, ["mode = 'observe'"]),
    "the last update along another direction": (
        {"predict.coefficients": "last"}, ["coefficients = 'last' with directions = ['drift', 'masked_slope']", "'optimizer'"]),
    "a shadow that nobody casts": (
        {"predict.use": "shadow", "predict.mode": "observe"}, ["use = 'shadow' with mode = 'observe'", "mode = 'auto'"]),
    "weights of documents that nobody chooses": (
        {"predict.selection": {"unbiased": True}}, ["selection.unbiased = true", "it is 'off'"]),
    "next to no documents": (
        {"predict.selection": {"kind": "history", "keep": 1e-9}}, ["predict.selection.keep = 1e-09", "0.01"]),
    "a memory shorter than a window": (
        {"predict.world": {"replay": 64, "bptt": 64}}, ["world.replay = 64", "world.bptt = 64"]),
    "all data held back": (
        {"predict.guard.tokens": 10**9}, ["predict.guard.tokens = 1,000,000,000", "training tokens would be held back"]),
    "no warm-up": ({"predict.warmup": 0}, ["predict.warmup = 0", "greater than 0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_values(name, home, tmp_path, capsys):
    changes, fragments = CASES[name]
    refuse = Refuse(home, tmp_path, capsys)
    refuse("train", home.write(tmp_path, {"predict.enabled": True} | changes), fragments=fragments)


@pytest.mark.slow
def test_a_direction_of_matrices_under_zero(home, tmp_path):
    changes = {"predict.enabled": True, "predict.directions": ["singular"], "compute.strategy": "deepspeed"}
    path = home.write(tmp_path, changes)
    for code, output in end(start_train([[str(path)]] * 2)):
        assert code == 2, output[-3000:]
    said = [line for line in output.splitlines() if line.startswith("scale: error: ")]
    assert len(said) <= 1 and not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()
    assert "Traceback" not in output
