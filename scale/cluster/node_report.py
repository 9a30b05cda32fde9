"""What one rank can find out about its machine by itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "deepspeed")
"""Must have the same version everywhere; a missing one counts as a version too."""
FOLDER_SECONDS = 5.0
"""How long another machine's new file may take to appear on a network file system."""


def versions() -> dict[str, str]:
    """Python and the packages that ranks must share."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def gpu(local_rank: int) -> dict[str, Any]:
    """Name and memory (bytes) of the GPU of this rank, and memory errors that its ECC could not correct, if readable.

    {"problem": text} if this rank has none that works.
    """
    import torch

    count = torch.cuda.device_count()
    if local_rank >= count:
        return {"problem": f"no GPU {local_rank}: torch sees {count} here"}
    try:
        properties = torch.cuda.get_device_properties(local_rank)
        torch.ones(8, device=f"cuda:{local_rank}").sum().item()
    except RuntimeError as error:
        return {"problem": f"GPU {local_rank} does not work: {' '.join(str(error).split())[:120]}"}
    found = {"name": properties.name, "memory": properties.total_memory}
    errors = _ecc_errors(str(properties.uuid))
    if errors is not None:
        found["ecc"] = errors
        if errors:
            found["problem"] = f"GPU {local_rank} has {errors} memory errors that ECC could not correct"
    return found


def _ecc_errors(uuid: str) -> int | None:
    query = [
        "nvidia-smi",
        f"--id=GPU-{uuid}",
        "--query-gpu=ecc.errors.uncorrected.volatile.total",
        "--format=csv,noheader",
    ]
    with suppress(OSError, subprocess.SubprocessError):
        text = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=10, check=True).stdout.strip()
        return int(text) if text.isdigit() else None
    return None


def write_token(folder: Path, token: str) -> str | None:
    """Leave a file that ranks on other machines must see. Returns what went wrong."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".preflight-{token}").write_text(token, encoding="ascii")
    except OSError as error:
        return f"{folder} is not writable: {error.strerror}"
    return None


def remove_token(folder: Path, token: str) -> None:
    """Take it away again."""
    with suppress(OSError):
        (folder / f".preflight-{token}").unlink()


def folder_problem(folder: Path, rank: int, token: str | None) -> str | None:
    """Whether this rank can write in the folder and sees the file of rank 0 there. `token` None: there is none."""
    own = folder / f".preflight-{rank}-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text("x", encoding="ascii")
        own.unlink()
    except OSError as error:
        return f"{folder} is not writable: {error.strerror}"
    if token is None:
        return None
    expected = folder / f".preflight-{token}"
    deadline = time.monotonic() + FOLDER_SECONDS
    while time.monotonic() < deadline:
        if expected in folder.iterdir():
            return None
        time.sleep(0.1)
    return f"{folder} is not shared: what rank 0 wrote there is not here"


def report(rank: int, local_rank: int, folder: Path, token: str | None, gpus: bool) -> dict[str, Any]:
    """All of it, as JSON."""
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "versions": versions(),
        "gpu": gpu(local_rank) if gpus else None,
        "folder": folder_problem(folder, rank, token),
    }
