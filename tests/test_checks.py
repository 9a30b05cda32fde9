"""What is refused before a run starts: models that no choice of micro-batch could fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scale.checks import check_memory
from scale.config import load_config
from scale.errors import UsageError
from scale.hardware import Hardware
from scale.models.size import Size

H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", 79 * 2**30, 16, (9, 0), 8)


def refused(path: Path, parameters: float, ranks: int, *words: str) -> str:
    """8 bytes a parameter for fp32 weights and gradients; '' if they fit."""
    size, config = Size(int(parameters), int(parameters), int(parameters)), load_config(path, words)
    strategy = "fsdp" if config.compute.strategy == "auto" else config.compute.strategy
    try:
        check_memory(size, config, strategy, H100, ranks)
    except UsageError as error:
        return str(error)
    return ""


def test_memory_follows_the_strategy(make_config: Callable[..., Path]) -> None:
    path = make_config()
    assert refused(path, 30e9, 8) == ""
    whole = refused(path, 30e9, 8, "compute.fsdp.shard=1")
    assert "224 GiB on each of 8 ranks" in whole and "compute.fsdp.shard=all" in whole
    assert refused(path, 30e9, 8, "compute.fsdp.shard=4") == ""
    assert "130 GiB on each of 4 ranks" in refused(path, 70e9, 4)
    assert refused(path, 70e9, 4, "compute.fsdp.offload=true") == ""
    zero = "compute.strategy=deepspeed"
    two = refused(path, 70e9, 4, zero, "compute.deepspeed.stage=2", "compute.deepspeed.offload=true")
    assert "130 GiB on each of 4 ranks" in two and "compute.deepspeed.stage=3" in two  # 2 bytes a parameter, whole
    assert "98 GiB" in refused(path, 70e9, 4, zero)  # a quarter of 2 + 4 bytes
    assert refused(path, 70e9, 4, zero, "compute.deepspeed.offload=true") == ""


def test_one_device(make_config: Callable[..., Path]) -> None:
    path = make_config()
    with pytest.raises(UsageError, match=r"75 GiB, but .* 74 GiB \(use a smaller model or a larger device\)"):
        small = Hardware("cuda", "card", 74 * 2**30, 16, (9, 0), 8)
        check_memory(Size(10**10, 10**10, 10**10), load_config(path), "single", small, 1)
