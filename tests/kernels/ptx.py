"""Triton kernels compiled for GPUs that are not there: the PTX, and what ptxas says about registers and spills."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ASSEMBLERS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """`registers` per thread, `spills` in bytes (stores and loads), `shared` memory in bytes."""

    ptx: str
    registers: int
    spills: int
    shared: int


def compile_for(
    capability: int,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    aligned: Iterable[int] = (),
    **options: Any,
) -> Compiled:
    """`kernel` compiled for compute capability 80 or 90.

    `signature` gives the type of every argument ("*fp32", "*i64", "i32", "constexpr"), `constants` the values of the
    constexprs; pointers at the places `aligned` are multiples of 16 bytes; `options` are those of a launch (num_warps,
    enable_fp_fusion ...).
    """
    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    known = {(place,): [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(fn=kernel, signature=full, constexprs=constants, attrs=known)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spills = _assemble(ptx, capability, options.get("enable_fp_fusion", True))
    return Compiled(ptx, registers, spills, compiled.metadata.shared)


def _assemble(ptx: str, capability: int, fuse: bool) -> tuple[int, int]:
    names = [f"sm_{capability}"] if capability < 90 else [f"sm_{capability}a", f"sm_{capability}"]
    complaints = []
    for assembler in ("ptxas", "ptxas-blackwell"):
        for name in names:
            command = [str(ASSEMBLERS / assembler), "-v", f"--gpu-name={name}", f"--fmad={str(fuse).lower()}"]
            done = subprocess.run(
                [*command, "-o", "/dev/null", "/dev/stdin"], input=ptx, text=True, capture_output=True
            )
            if done.returncode == 0:
                return _read(done.stderr)
            complaints.append(f"{assembler} {name}: {done.stderr.strip()[:500]}")
    raise RuntimeError("\n".join(complaints))


def _read(log: str) -> tuple[int, int]:
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if registers is None or len(spills) != 2:
        raise RuntimeError(f"ptxas said nothing about registers or spills:\n{log}")
    return int(registers[1]), sum(map(int, spills))
