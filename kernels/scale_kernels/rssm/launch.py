"""Which kernel with which blocks, and its launch.

Chosen from what the compiler says for sm_80 and sm_90 (registers, spills, shared memory): see README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from scale_kernels.rssm.triton import rollout_resident, rollout_streaming
from scale_kernels.rssm.weights import RssmWeights, action_gates

MAX_HIDDEN, MAX_LATENT, MAX_OUTPUTS = 256, 64, 64
KIB = 1024


@dataclass(frozen=True)
class Launch:
    """`kernel` and its compile-time arguments; `BLOCK` paths share a program."""

    kernel: triton.JITFunction
    constants: dict[str, int | str]
    num_warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        """For the compiler. Left alone, ptxas saves registers for a second program per processor, and spills.

        Fusing is said because Triton 3.10 changes its default.
        """
        return {"num_warps": self.num_warps, "maxnreg": 255, "enable_fp_fusion": True}

    @property
    def block(self) -> int:
        return int(self.constants["BLOCK"])


def choose(weights: RssmWeights, paths: int, shared: int, processors: int) -> Launch:
    """The launch for `paths` per member on a GPU with `shared` bytes of shared memory a block and so many processors.

    fp32 products are exact FMAs, whose block may be as small as one path: the smallest that leaves no processor with
    two programs, up to 8. bf16 products are tiles of tensor cores, 8 or 16 paths wide. Weights stay on the chip if they fit.
    Raises ValueError beyond the sizes the kernel was made for.
    """
    H, Z, O = weights.hidden, weights.latent, weights.outputs  # noqa: E741
    if H > MAX_HIDDEN or Z > MAX_LATENT or O > MAX_OUTPUTS:
        limits = f"at most {MAX_HIDDEN}, {MAX_LATENT} and {MAX_OUTPUTS}"
        raise ValueError(f"rssm: hidden {H}, latent {Z}, outputs {O}: the kernel takes {limits}")
    HP, ZP, OP = padded(H), padded(Z), padded(O)
    half = weights.dtype == torch.bfloat16
    size = (3 * HP * (HP + ZP) + 2 * ZP * HP + OP * (HP + ZP)) * (2 if half else 4)
    resident = size <= min(148 * KIB if half else 100 * KIB, shared * 9 // 10)
    block, largest = (8, 16) if half else (1, 8)
    while block < largest and weights.members * triton.cdiv(paths, block) > processors:
        block *= 2
    constants: dict[str, int | str] = {"H": H, "Z": Z, "O": O, "HP": HP, "ZP": ZP, "OP": OP, "BLOCK": block}
    constants |= {"CHUNK": 64 if shared >= 112 * KIB else 32, "PRECISION": "ieee"}
    return Launch(rollout_resident if resident else rollout_streaming, constants, 4 if HP <= 32 else 8)


def padded(n: int) -> int:
    """The next power of two, at least the 16 that a product sums over."""
    return max(16, triton.next_power_of_2(n))


def rollout_triton(
    weights: RssmWeights, h0_EPH: Tensor, z0_EPZ: Tensor, actions: Tensor, eps_TEPZ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `scale_kernels.rssm.rollout`; shapes are not checked here. Raises ValueError as `choose` does."""
    device = triton.runtime.driver.active.utils.get_device_properties(h0_EPH.device.index)
    launch = choose(weights, h0_EPH.shape[1], device["max_shared_mem"], device["multiprocessor_count"])
    with torch.cuda.device(h0_EPH.device):
        return run(launch, weights, h0_EPH, z0_EPZ, actions, eps_TEPZ)


def run(
    launch: Launch, weights: RssmWeights, h0_EPH: Tensor, z0_EPZ: Tensor, actions: Tensor, eps_TEPZ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate, launch once, return outputs_TEPO, h_EPH, z_EPZ."""
    T, E, P, _ = eps_TEPZ.shape
    H, programs = weights.hidden, triton.cdiv(P, launch.block)
    outputs_TEPO = h0_EPH.new_empty(T, E, P, weights.outputs)
    h_EPH, z_EPZ = torch.empty_like(h0_EPH.contiguous()), torch.empty_like(z0_EPZ.contiguous())
    scratch = h0_EPH.new_empty(E, programs, 2, launch.block, H if launch.kernel is rollout_streaming else 0)
    gates = action_gates(weights, actions)
    w = {name: tensor.contiguous() for name, tensor in weights.tensors().items()}
    launch.kernel[(E, programs)](
        gates, w["w_ih"], w["w_hh"], w["b_hh"], w["prior_weight"], w["prior_bias"], w["head_weight"], w["head_bias"],
        h0_EPH.contiguous(), z0_EPZ.contiguous(), eps_TEPZ.contiguous(), outputs_TEPO, h_EPH, z_EPZ, scratch,
        T, E, P, w["w_ih"].shape[2], gates.stride(0), gates.stride(1), gates.stride(2) if actions.ndim == 4 else 0,
        weights.min_std, **launch.constants, **launch.options,
    )  # fmt: skip
    return outputs_TEPO, h_EPH, z_EPZ
