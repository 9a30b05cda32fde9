"""The generators go on exactly where they were, through JSON."""

import json
import random

import numpy as np
import pytest
import torch

from scale.checkpoint.rng import load_rng_state, rng_state
from scale.errors import ScaleError


def draw() -> list[object]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(3).tolist(),
        torch.rand(5).tolist(),
        torch.randn(17).tolist(),
    ]


def test_round_trip_through_json() -> None:
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    random.gauss(0, 1)  # leaves a second normal number in store, in Python and in numpy
    np.random.randn(1)
    text = json.dumps(rng_state(), allow_nan=False)
    first = [draw() for _ in range(300)]  # beyond 624 words: the twister turns over
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    assert draw() != first[0]
    load_rng_state(json.loads(text))
    assert [draw() for _ in range(300)] == first
    load_rng_state(json.loads(text))
    assert json.dumps(rng_state()) == text


def test_a_state_of_another_kind_of_device_is_refused_before_anything_changes() -> None:
    state = rng_state()
    state["cuda"] = [] if state["cuda"] else [state["torch"]]
    random.seed(1)
    before = random.getstate()
    with pytest.raises(ScaleError, match="a CUDA device"):
        load_rng_state(state)
    assert random.getstate() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_generators_round_trip() -> None:
    torch.cuda.manual_seed_all(1)
    text = json.dumps(rng_state())
    first = torch.rand(1000, device="cuda").tolist()
    load_rng_state(json.loads(text))
    assert torch.rand(1000, device="cuda").tolist() == first
