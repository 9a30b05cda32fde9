"""The Triton kernels: interpreted against float64, compiled for GPUs that are not there, run on one that is."""

from __future__ import annotations

import pytest
import torch
from scale_kernels.rssm import rollout
from scale_kernels.rssm.launch import choose
from scale_kernels.rssm.reference import rollout_reference

from benchmarks.rssm_work import Case, converted, differences, make
from tests.kernels.interpreter import interpreted
from tests.kernels.ptx import Compiled, compile_for
from tests.kernels.rssm_cases import CASES, poisoned_memory, run_kernel

GPUS = {80: (166_912, 108), 90: (232_448, 132)}
"""Bytes of shared memory a block may have, and processors: A100, H100."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_do_what_the_reference_does_in_float64(case):
    kernel, found = interpreted(run_kernel, case)
    assert kernel == ("rollout_resident" if case.shared and case.hidden <= 64 else "rollout_streaming")
    errors = differences(found, rollout_reference(*make(case)))
    assert max(errors) < 5e-6, errors  # also false for NaN


def compiled(launch, half: bool, capability: int) -> Compiled:
    names = launch.kernel.arg_names
    pointers = names.index("scratch") + 1
    weights = {"w_ih", "w_hh", "b_hh", "w_prior", "b_prior", "w_head", "b_head"}
    signature = {name: "*bf16" if half and name in weights else "*fp32" for name in names[:pointers]}
    signature |= {name: "i32" for name in names[pointers : names.index("min_std")]} | {"min_std": "fp32"}
    return compile_for(
        capability, launch.kernel, signature, launch.constants, aligned=range(pointers), **launch.options
    )


SHAPES = [(32, False, 1), (32, False, 64), (64, False, 1), (64, False, 1024), (128, False, 64), (256, False, 1024)]
SHAPES += [(32, True, 16), (64, True, 16), (128, True, 1), (128, True, 1024), (256, True, 1024)]
RESIDENT = {(32, False), (64, False), (32, True), (64, True), (128, True)}


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize(("hidden", "half", "paths"), SHAPES)
def test_compiles_for_a_gpu_without_spills(hidden, half, paths, capability):
    weights = make(Case(hidden, 32, 7, 1, 1), members=5)[0].to(torch.bfloat16 if half else torch.float32)
    launch = choose(weights, paths, *GPUS[capability])
    assert ("resident" in launch.kernel.__name__) == ((hidden, half) in RESIDENT)
    kernel = compiled(launch, half, capability)
    print(f"H={hidden} bf16={half} block={launch.block} sm_{capability}: {kernel.registers}, {kernel.shared} bytes")
    assert kernel.spills == 0
    assert 32 < kernel.registers <= 255 and kernel.shared <= GPUS[capability][0]


def test_blocks_grow_with_paths_and_sizes_have_limits():
    weights = make(Case(32, 32, 7, 1, 1), members=5)[0].to(torch.float32)
    assert [choose(weights, paths, *GPUS[90]).block for paths in (1, 26, 27, 64, 4096)] == [1, 1, 2, 4, 8]
    assert [choose(weights.to(torch.bfloat16), paths, *GPUS[90]).block for paths in (1, 4096)] == [8, 16]
    with pytest.raises(ValueError, match="at most 256"):
        choose(make(Case(257, 32, 7, 1, 1))[0], 1, *GPUS[90])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "case", [*CASES, *(Case(h, 32, 7, p, 75) for h in (32, 64, 128, 256) for p in (1, 64))], ids=str
)
def test_on_a_gpu(case, half):
    given = make(case, members=5)
    if half:  # the same rounded weights, and the rounding of products, in the reference
        given = converted(given, torch.float32)
        given = (given[0].to(torch.bfloat16), *given[1:])
    on_gpu = converted(given, "cuda") if half else converted(converted(given, torch.float32), "cuda")
    with poisoned_memory():
        found = rollout(*on_gpu)
    errors = differences(found, rollout_reference(*given))
    assert max(errors) < (3e-2 if half else 5e-5), errors
