"""How fast are the kernels that go over all shards of a model, beside a plain copy of as many bytes?

    python benchmarks/shards_kernel.py                          # 1M ... 1B parameters on a GPU, to 100M on a CPU
    python benchmarks/shards_kernel.py --sizes 1000000 --rounds 3 --out /tmp/bench

encode: 12 statistics per group from four lists. delta: parameters moved along K directions. Every provider first has to
give the right result at a small size. Then, per size and round, each runs once, and so does a plain copy that moves as many
bytes: the ratio of a `bandwidth` row is the share of the copy's. Caches are flushed before each measurement. On a GPU
events take the time, and the host runs ahead, as it does in training; on a CPU there is no Triton.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run by path: make the folder above importable
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

import torch
from scale_kernels.delta.reference import stepped
from scale_kernels.encode.reference import encode_reference
from torch import Tensor

from benchmarks.common import RESULTS, Row, print_table, summarise, this_machine, write_csv
from benchmarks.shards_providers import GROUPS, Run, Shards, delta_providers, encode_providers, make_shards
from scale.errors import ScaleError

NAME = "shards_kernel"
GATE_SIZE = 100_000
FLUSH_BYTES = 256 * 2**20
HOST_AHEAD = 4_000_000
"""GPU clock cycles, about 2 ms: what the host does in a call is hidden, unless it waits for the device."""


@dataclass(frozen=True)
class Case:
    """One kernel at one dtype; delta has `lists` - 1 directions."""

    kernel: str
    dtype: torch.dtype
    lists: int

    @property
    def name(self) -> str:
        kind = "bf16" if self.dtype is torch.bfloat16 else "fp32"
        return f"{self.kernel} {kind}" + (f" K={self.lists - 1}" if self.kernel == "delta" else "")

    def make(self, size: int, device: str) -> tuple[Shards, dict[str, Run]]:
        shards = make_shards(size, self.lists, self.dtype, device)
        return shards, (encode_providers if self.kernel == "encode" else delta_providers)(shards, device)

    def bytes_moved(self, shards: Shards) -> int:
        """Each list read once; delta writes the parameters as well."""
        read = shards.bytes_read
        return read if self.kernel == "encode" else read + read // self.lists


CASES = [
    Case("encode", torch.float32, 4),
    Case("encode", torch.bfloat16, 4),
    Case("delta", torch.float32, 2),
    Case("delta", torch.float32, 5),
    Case("delta", torch.bfloat16, 2),
]
CPU_CASES = [case for case in CASES if case.dtype is torch.float32]


def gate(case: Case, device: str) -> None:
    """ScaleError if a provider is wrong."""
    names = list(case.make(GATE_SIZE, device)[1])
    for name in names:
        shards, providers = case.make(GATE_SIZE, device)
        before = [x.clone() for x in shards.lists[0]]
        found_GC = providers[name]()
        worst = encode_error(shards, found_GC) if found_GC is not None else delta_error(shards, before)
        allowed = 1e-2 if case.dtype is torch.bfloat16 and name != "triton" else 1e-5
        if case.kernel == "delta" and case.dtype is torch.bfloat16:
            allowed = (case.lists - 1) * 2**-7  # one bf16 step per rounding
        if not worst <= allowed:
            raise ScaleError(f"{case.name}: {name} is off by {worst:.3g} (allowed: {allowed:.3g})")


def encode_error(shards: Shards, found_GC: Tensor) -> float:
    """Largest error over the sum of absolute values."""
    expected_GC = encode_reference(shards.lists, shards.group_N, GROUPS)
    scale_GC = encode_reference([[x.abs() for x in tensors] for tensors in shards.lists], shards.group_N, GROUPS)
    return float(((found_GC.cpu() - expected_GC).abs() / scale_GC.clamp(min=1e-30)).max())


def delta_error(shards: Shards, before: list[Tensor]) -> float:
    """Largest error over what was added up."""
    params, *directions = shards.lists
    worst = 0.0
    for n, group in enumerate(shards.group_N):
        steps = [c * x[n].float() for c, x in zip(shards.c_KG[:, group], directions, strict=True)]
        exact = stepped(before[n], [x[n] for x in directions], list(shards.c_KG[:, group]))
        size = before[n].float().abs() + sum(step.abs() for step in steps)
        worst = max([worst, *((params[n].float() - exact).abs() / size.clamp(min=1e-30)).flatten().tolist()])
    return worst


def seconds(run: Callable[[], object], device: str, flush: Tensor) -> float:
    flush.zero_()
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    torch.cuda._sleep(HOST_AHEAD)
    begins, ends = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begins.record()
    run()
    ends.record()
    ends.synchronize()
    return begins.elapsed_time(ends) / 1e3


def measure(case: Case, size: int, rounds: int, device: str) -> list[Row]:
    """Rows of `time` (over torch._foreach) and `bandwidth` (over the copy)."""
    shards, providers = case.make(size, device)
    moved = case.bytes_moved(shards)
    source = torch.zeros(moved // 8, device=device)
    target = torch.empty_like(source)
    flush = torch.empty(FLUSH_BYTES // (1 if device == "cuda" else 4), dtype=torch.uint8, device=device)
    runs: dict[str, Callable[[], object]] = {**providers, "copy": lambda: target.copy_(source)}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device, flush))
    speeds = {name: [moved / value / 1e9 for value in values] for name, values in times.items()}
    rows = summarise(NAME, "time", "s", size, case.name, times, "torch._foreach")
    return rows + summarise(NAME, "bandwidth", "GB/s", size, case.name, speeds, "copy")


def fits(case: Case, size: int, device: str) -> bool:
    """Lists, both sides of the copy, and the products that torch._foreach keeps, on 90% of a GPU's memory."""
    if device == "cpu":
        return True
    torch.cuda.empty_cache()
    element = case.dtype.itemsize
    return size * element * (2 * case.lists + 2) < 0.9 * torch.cuda.mem_get_info()[0]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python benchmarks/{NAME}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="numbers of parameters")
    parser.add_argument("--rounds", type=int, help="measurements of each (default: 20, on a CPU 5)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of {NAME}.csv")
    args = parser.parse_args(arguments)
    small = [n for n in args.sizes or [] if n < GATE_SIZE]
    if small or (args.rounds is not None and args.rounds < 1):
        parser.error(f"--sizes from {GATE_SIZE}, --rounds from 1")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("no GPU: nothing is said about the kernels; measured are the CPU path, torch._foreach and the reference")
    sizes = args.sizes or [10**6, 10**7, 10**8, *([10**9] if device == "cuda" else [])]
    rounds = args.rounds or (20 if device == "cuda" else 5)
    rows: list[Row] = []
    path, machine = args.out / f"{NAME}.csv", this_machine()
    try:
        for case in CASES if device == "cuda" else CPU_CASES:
            gate(case, device)
            for size in sizes:
                if not fits(case, size, device):
                    print(f"{case.name}: {size:,} parameters do not fit, left out")
                    continue
                rows += (found := measure(case, size, rounds, device))
                write_csv(path, rows, machine)
                print_table([row for row in found if row.metric == "bandwidth"], f"{case.name}, GB/s")
    except ScaleError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
