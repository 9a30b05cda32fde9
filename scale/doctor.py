"""`scale doctor`: what is wrong, each with its fix, what is installed, and what `auto` would choose on this machine."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scale.errors import EXIT_FAILED, EXIT_OK
from scale.packages import extras, install_line, installed, package_problems

LEAST_FREE = 2 * 10**9
"""Bytes; the first checkpoints of even a small run and its token cache want this much."""
_MICRO_TOKENS = 8192
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")


def print_report() -> int:
    """The verdict first, then what is installed and what `auto` would choose; the exit code says whether something is wrong."""
    problems = [*package_problems(), *folder_problems(Path.cwd()), *token_problems(Path.cwd())]
    problems += kernels_problems([Path.cwd(), Path(__file__).parents[1]])
    here: list[tuple[str, str, str]] = []
    try:
        here = machine()
        problems += torch_problems()
    except Exception as error:  # torch or transformers itself is broken, in whatever way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problems.append(f"torch or transformers cannot be used ({reason}): install them anew")
    console = Console(soft_wrap=True)
    for problem in problems:
        console.print(Text.assemble(("wrong: ", "bold red"), problem))
    if not problems:
        console.print("nothing is wrong")
    console.print()
    _print_packages(console)
    if here:
        _print_machine(console, here)
    return EXIT_FAILED if problems else EXIT_OK


def _print_packages(console: Console) -> None:
    """One line for what is needed, one for the extras that are here, one for those that are not."""
    packages = ", ".join(f"{name} {version}" for name, version, _ in installed())
    have, lack = extras()
    console.print(Text(f"installed: {packages}"))
    if have:
        console.print(Text(f"extras installed: {', '.join(have)}"))
    if lack:
        how = install_line(["NAME"])
        console.print(Text(f"extras not installed: {', '.join(lack)} (only for options that name them: {how})"))
    console.print()


def _print_machine(console: Console, rows: Iterable[tuple[str, str, str]]) -> None:
    table = Table(title="this machine", title_justify="left", show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def machine() -> list[tuple[str, str, str]]:
    """This machine, and what every `auto` becomes on it: name, value, reason."""
    from scale.config.model import ModelConfig
    from scale.hardware import (
        choose_attention,
        choose_compile,
        choose_kernels,
        choose_loss,
        choose_precision,
        choose_recompute,
        detect,
        has_fp8,
    )
    from scale.models.attention import supported_attention
    from scale.models.build import build_model
    from scale.models.heads import obstacle
    from scale.models.hf_config import model_config
    from scale.models.kernels import liger_knows
    from scale.models.size import model_size

    hardware = detect()
    preset = ModelConfig(preset="100m")
    config = model_config(preset)
    precision = choose_precision("auto", hardware)
    attention = choose_attention("auto", hardware, supported_attention(config), precision=precision.value)
    model, _ = build_model(preset, config, attention.value, seed=0)
    knows = hardware.device == "cuda" and liger_knows(config.model_type)
    choices = {
        "compute.precision": precision,
        "compute.compile": choose_compile("auto", hardware),
        "compute.attention": attention,
        "compute.kernels": choose_kernels("auto", hardware, config.model_type, knows),
        "compute.recompute": choose_recompute("auto", model_size(model).total),
        "compute.loss": choose_loss("auto", hardware, _MICRO_TOKENS, config.vocab_size, obstacle(model)),
    }
    of = {
        "compute.precision": "before fp8 is measured: " if has_fp8(hardware) else "",
        "compute.recompute": "for the preset 100m: ",
        "compute.loss": f"for the preset 100m and {_MICRO_TOKENS} tokens in a micro-batch: ",
    }
    facts = f"{hardware.memory / 2**30:.0f} GiB, {hardware.cores} CPU cores"
    more = f", one of {hardware.count}" if hardware.count > 1 else ""
    rows = [("compute.device", hardware.device, f"{hardware.name}{more}, {facts}")]
    return rows + [(name, choice.value, of.get(name, "") + choice.reason) for name, choice in choices.items()]


def torch_problems() -> list[str]:
    """What keeps torch from a GPU that is there."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is explained here
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return cuda_problems(driver_cuda(), torch.version.cuda, gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver of this machine supports; None without a driver."""
    if not any(Path(sign).exists() for sign in ("/proc/driver/nvidia/version", "/dev/dxg")):
        return None  # libcuda alone is no driver: images for GPUs carry one
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def cuda_problems(driver: tuple[int, int] | None, built: str | None, gpus: int, visible: str | None) -> list[str]:
    """Why there is a driver but no GPU for torch, which is `built` for a CUDA version (None: for none)."""
    if driver is None or gpus:
        return []
    supported = f"{driver[0]}.{driver[1]}"
    if built is None:
        return [
            f"an NVIDIA driver (CUDA {supported}) is here, but torch is built without CUDA: "
            "install the build for CUDA that pytorch.org/get-started names"
        ]
    if int(built.split(".")[0]) > driver[0]:
        return [
            f"torch is built for CUDA {built}, but the NVIDIA driver supports CUDA {supported} at most: "
            f"update the driver, or install torch built for CUDA {driver[0]}"
        ]
    if visible is not None:
        return [f"an NVIDIA driver is here, but CUDA_VISIBLE_DEVICES={visible!r} leaves no GPU: unset it"]
    return ["an NVIDIA driver is here, but torch sees no GPU: see what nvidia-smi says (a container needs --gpus all)"]


def folder_problems(folder: Path) -> list[str]:
    """Whether runs can be written into a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return [f"{folder}: nothing can be written here ({error.strerror}): work in another folder"]
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        return [
            f"{folder}: {free / 1e9:.1f} GB of disk are free, less than {LEAST_FREE / 1e9:.0f}: "
            "make room, or set runs_dir and data.cache to another disk"
        ]
    return []


def kernels_problems(folders: Iterable[Path]) -> list[str]:
    """A package `kernels` in a folder Python imports from hides the one from Hugging Face that transformers uses."""
    files = dict.fromkeys(folder.resolve() / "kernels" / "__init__.py" for folder in folders)
    return [f"{file}: hides the Hugging Face package `kernels`: delete this file" for file in files if file.exists()]


def token_problems(folder: Path) -> list[str]:
    """Hugging Face tokens in the YAML files of a folder and its `configs`; the token itself is not repeated."""
    files = [*folder.glob("*.y*ml"), *folder.glob("configs/**/*.y*ml")]
    return [
        f"{file.relative_to(folder)}:{number}: holds a Hugging Face token: revoke it, delete it here, and set HF_TOKEN"
        for file in sorted(files)
        if file.is_file() and os.access(file, os.R_OK)
        for number, line in enumerate(file.read_bytes().splitlines(), start=1)
        if _TOKEN.search(line)
    ]
