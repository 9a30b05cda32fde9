"""`scale doctor`: what is installed, what `auto` would choose on this machine, and what is wrong, each with its fix.

Packages are judged by their metadata, never by importing them: some take seconds, some raise anything on import.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scale.errors import EXIT_FAILED, EXIT_OK

DISTRIBUTION = "scale-trainer"
LEAST_FREE = 2 * 10**9
"""Bytes; the first checkpoints of even a small run and its token cache want this much."""
_MICRO_TOKENS = 8192
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")


@dataclass(frozen=True)
class Unmet:
    """A requirement that is not met; `installed` is the version that is there instead, if any."""

    requirement: Requirement
    installed: str | None

    def __str__(self) -> str:
        name, needed = self.requirement.name, self.requirement.specifier
        if self.installed is None:
            return f"{name} is not installed"
        return f"{name} {self.installed} is installed, but {needed} is needed"


def print_report() -> int:
    """Print everything; the exit code says whether something is wrong."""
    problems = [*package_problems(), *folder_problems(Path.cwd()), *token_problems(Path.cwd())]
    problems += kernels_problems([Path.cwd(), Path(__file__).parents[1]])
    console = Console(soft_wrap=True)
    _print_table(console, "installed", ("", "here", "needed"), installed())
    _print_table(console, "extras", ("", "state", "installed by"), extras())
    try:
        _print_table(console, "this machine", ("", "", ""), machine())
        problems += torch_problems()
    except Exception as error:  # torch or transformers itself is broken, in whatever way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problems.append(f"torch or transformers cannot be used ({reason}): install them anew")
    for problem in problems:
        console.print(Text.assemble(("wrong: ", "bold red"), problem))
    if not problems:
        console.print("nothing is wrong")
    return EXIT_FAILED if problems else EXIT_OK


def _print_table(console: Console, title: str, header: Sequence[str], rows: Iterable[tuple[str, str, str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=any(header), box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold", no_wrap=name == "installed by")  # to be copied in one piece
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: [extra] is no markup
    console.print(table, "")


def requirements(distribution: str, extra: str = "") -> list[Requirement]:
    """What a distribution requires on this machine: always, or in addition for an extra."""
    found = []
    for requirement in map(Requirement, metadata.requires(distribution) or []):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always if not extra else (not always and marker is not None and marker.evaluate({"extra": extra})):
            found.append(requirement)
    return found


def unmet(requirement: Requirement) -> list[Unmet]:
    """Why a requirement, with its extras, is not met; empty if it is."""
    installed = version(requirement.name)
    if installed is None or not requirement.specifier.contains(installed, prereleases=True):
        return [Unmet(requirement, installed)]
    inner = [part for extra in sorted(requirement.extras) for part in requirements(requirement.name, extra)]
    return [problem for part in inner for problem in unmet(part)]


def version(distribution: str) -> str | None:
    """Installed version, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def extra_names() -> list[str]:
    """The extras of this framework."""
    return metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []


def installed() -> list[tuple[str, str, str]]:
    """Python and every package this framework cannot do without: name, version here, versions that do."""
    if version(DISTRIBUTION) is None:
        return [("python", platform.python_version(), "")]
    python = ("python", platform.python_version(), metadata.metadata(DISTRIBUTION)["Requires-Python"])
    needed = [(r.name, version(r.name) or "missing", str(r.specifier)) for r in requirements(DISTRIBUTION)]
    return [python, (DISTRIBUTION, version(DISTRIBUTION) or "", ""), *needed]


def extras() -> list[tuple[str, str, str]]:
    """Name, state and pip line of every extra."""
    if version(DISTRIBUTION) is None:
        return []
    rows = []
    for extra in extra_names():
        problems = [problem for r in requirements(DISTRIBUTION, extra) for problem in unmet(r)]
        missing = ", ".join(p.requirement.name for p in problems if p.installed is None)
        outdated = ", ".join(f"{p.requirement.name} {p.installed}" for p in problems if p.installed is not None)
        parts = [f"missing: {missing}" if missing else "", f"does not fit: {outdated}" if outdated else ""]
        rows.append((extra, "; ".join(filter(None, parts)) or "installed", _pip(extra)))
    return rows


def _pip(extra: str) -> str:
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def package_problems() -> list[str]:
    """Required packages that are missing or out of range, and installed optional ones out of range."""
    if version(DISTRIBUTION) is None:
        return [f"{DISTRIBUTION} is not installed: run pip install -e . in its checkout"]
    problems = [
        f"{problem}: pip install '{problem.requirement.name}{problem.requirement.specifier}'"
        for requirement in requirements(DISTRIBUTION)
        for problem in unmet(requirement)
    ]
    for extra in extra_names():
        outdated = [p for r in requirements(DISTRIBUTION, extra) for p in unmet(r) if p.installed is not None]
        problems += [f"{problem} for the extra {extra}: {_pip(extra)}" for problem in outdated]
    return problems


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
