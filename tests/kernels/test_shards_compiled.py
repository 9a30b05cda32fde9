"""Encode and delta as compiled for GPUs that are not here: no spills, loads 16 bytes wide, registers for full occupancy."""

from __future__ import annotations

import re

import pytest
import triton
from packaging.version import Version
from scale_kernels.delta import triton as delta
from scale_kernels.encode import triton as encode

from tests.kernels.ptx import Compiled, compile_for

TABLE = {"addresses": "*i64", "sizes": "*i64", "tiles": "*i32", "tensors": "i32"}
TILE_SUMS = {**TABLE, "partials": "*fp32", "slots": "i32"}
GROUP_SUMS = {"partials": "*fp32", "first_tile": "*i32", "out": "*fp32", "slots": "i32"}
MOVE = {**TABLE, "first_index": "*i64", "groups_of": "*i32", "coefficients": "*fp32", "seed": "i64", "groups": "i32"}
REGISTERS = 80
"""At most: three blocks of 256 threads on a multiprocessor of 65,536 registers, 48 KiB of loads under way."""
SPILLS = 0 if Version(triton.__version__) >= Version("3.7") else 16
"""Bytes of triton 3.6 in one case: four lists of bf16 for sm_90."""
both = pytest.mark.parametrize("capability", [80, 90])


def wide(ptx: str, kind: str) -> int:
    return len(re.findall(rf"{kind}\.global\.v4\.b32", ptx))


def compile_sums(capability: int, bf16: int, given: int, aligned: bool = True) -> Compiled:
    shape = encode.shape_of(bf16, given)
    constants = {"GIVEN": given, "BF16": bf16, "ALIGNED": aligned, "TILE": encode.TILE, **shape}
    warps = encode.THREADS // 32
    return compile_for(capability, encode.tile_sums, TILE_SUMS, constants, num_warps=warps, enable_fp_fusion=True)


def compile_move(capability: int, directions: int, bf16: int) -> Compiled:
    constants = {"K": directions, "BF16": bf16, "ALIGNED": True, "TILE": delta.TILE, **delta.shape_of(bf16)}
    return compile_for(capability, delta.move, MOVE, constants, num_warps=delta.THREADS // 32, enable_fp_fusion=False)


@both
@pytest.mark.parametrize(("bf16", "wide_loads"), [(0, 4), (0b1111, 4), (0b0010, 3)])
def test_tile_sums(capability, bf16, wide_loads):
    compiled = compile_sums(capability, bf16, 0b1111)
    assert compiled.spills <= (SPILLS if (capability, bf16) == (90, 0b1111) else 0)
    assert compiled.registers <= REGISTERS
    assert wide(compiled.ptx, "ld") == wide_loads
    loop = re.search(r"(\$L__BB\d+_\d+):(?:(?!\$L__BB\d+_\d+:).)*?bra\S*\s+\1;", compiled.ptx, re.DOTALL)
    assert loop is not None and wide(loop[0], "ld") == wide_loads
    assert "bar.sync" not in loop[0] and "shfl" not in loop[0], "threads exchange something in every step"


def test_without_alignment_loads_are_narrow():
    assert wide(compile_sums(90, 0, 0b1111, aligned=False).ptx, "ld") == 0


@both
def test_group_sums(capability):
    constants = {"COLUMNS": 12, "BLOCK": encode.REDUCE_BLOCK}
    assert (
        compile_for(capability, encode.group_sums, GROUP_SUMS, constants, num_warps=4, enable_fp_fusion=True).spills
        == 0
    )


@both
@pytest.mark.parametrize(("directions", "bf16"), [(1, 0), (4, 0), (4, 0b11111), (1, 0b11), (4, 0b11110), (4, 1)])
def test_move(capability, directions, bf16):
    compiled = compile_move(capability, directions, bf16)
    assert compiled.spills == 0 and compiled.registers <= REGISTERS
    assert wide(compiled.ptx, "st") == 1
    assert wide(compiled.ptx, "ld") >= (1 if bf16 == 0b11110 else 1 + directions)
    assert "bar.sync" not in compiled.ptx, "tensors change their layout on the way"


@both
def test_products_and_sums_are_rounded_apart(capability):
    assert "fma" not in compile_move(capability, 4, 0).ptx
