"""Environment variables that a launcher gives its ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

TRACED_COLLECTIVES = 2000
"""Collectives that the flight recorder remembers."""


def rank_environment(given: Mapping[str, str], ranks: int, dumps: Path, interface: str | None) -> dict[str, str]:
    """What to add to the environment `given`; what the user set there stays.

    ranks: processes on this machine, which share its cores; dumps: folder for NCCL's flight recorder, one file per rank
    (`TORCH_FR_*` are the names since torch 2.9; the recorder is read by `torch.distributed.flight_recorder.fr_trace`);
    interface: network interface for gloo; None leaves the choice to gloo.
    """
    wanted = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": str(TRACED_COLLECTIVES),
        "TORCH_FR_DUMP_TEMP_FILE": str(dumps / "nccl_trace_rank_"),
    }
    old = {"TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE"}
    old["TORCH_FR_DUMP_TEMP_FILE"] = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
    if interface is not None:
        wanted["GLOO_SOCKET_IFNAME"] = interface
    return {name: value for name, value in wanted.items() if not {name, old.get(name, name)} & set(given)}
