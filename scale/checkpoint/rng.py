"""The random generators of a process as JSON: a resumed run draws the very numbers it would have drawn."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch

from scale.errors import ScaleError


def rng_state() -> dict[str, Any]:
    """State of Python's, numpy's, torch's CPU and (once CUDA is in use) the current CUDA device's generator."""
    version, words, gauss = random.getstate()
    numpy_name, numpy_words, position, has_gauss, cached = np.random.get_state()
    devices = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [numpy_name, [int(word) for word in numpy_words], position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in devices],
    }


def seed_all(seed: int) -> None:
    """Seed the generators that `rng_state` covers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA devices too


def load_rng_state(state: dict[str, Any]) -> None:
    """Set all generators to what `rng_state` returned. Raises ScaleError if only one of the two has a CUDA device."""
    here = torch.cuda.is_initialized()
    if bool(state["cuda"]) != here:
        where = ("with", "without") if state["cuda"] else ("without", "with")
        raise ScaleError(
            f"random state saved {where[0]} a CUDA device, but this run is {where[1]}: use the same device"
        )
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_name, numpy_words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((numpy_name, np.array(numpy_words, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if here:
        torch.cuda.set_rng_state(_decode(state["cuda"][0]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
