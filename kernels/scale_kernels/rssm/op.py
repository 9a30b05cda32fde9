"""`rollout`: one call, the fastest way there is on the device of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from scale_kernels.rssm.cpu import rollout_cpu
from scale_kernels.rssm.reference import rollout_reference
from scale_kernels.rssm.weights import RssmWeights, check

SMALL = 4096
"""Paths times hidden units up to which `cpu.py` was no slower than the plain loop: beyond, products outweigh calls."""


def rollout(
    weights: RssmWeights, h0_EPH: Tensor, z0_EPZ: Tensor, actions: Tensor, eps_TEPZ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Imagine T steps of P paths in each of E members, every step fed with the latent that the one before sampled.

    `actions` (T, A), the same for every path, or (T, E, P, A); `eps_TEPZ` standard normal noise. States in fp32;
    weights in fp32 or, on a GPU, bf16 with fp32 sums. Returns outputs_TEPO and the last h_EPH and z_EPZ. CUDA tensors
    take the Triton kernel, CPU tensors torch; triton is imported only for the former. Forward only.

    Raises ValueError if shapes or dtypes do not fit, sizes are beyond the kernel's limits or gradients are wanted
    (they would be lost: take `scale_kernels.rssm.reference.rollout_reference`); ImportError on a GPU without triton.
    """
    check(weights, h0_EPH, z0_EPZ, actions, eps_TEPZ)
    on_gpu = h0_EPH.device.type == "cuda"
    allowed = (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,)
    if h0_EPH.dtype != torch.float32 or weights.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        place = h0_EPH.device.type
        raise ValueError(
            f"rssm: on {place} states are float32 and weights {names}, not {h0_EPH.dtype}, {weights.dtype}"
        )
    given = (*weights.tensors().values(), h0_EPH, z0_EPZ, actions, eps_TEPZ)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ValueError("rssm: rollout has no backward pass: use rollout_reference, or call it under torch.no_grad()")
    with torch.no_grad():
        if not on_gpu:
            small = h0_EPH.shape[1] * weights.hidden <= SMALL
            return (rollout_cpu if small else rollout_reference)(weights, h0_EPH, z0_EPZ, actions, eps_TEPZ)
        from scale_kernels.rssm.launch import rollout_triton

        return rollout_triton(weights, h0_EPH, z0_EPZ, actions, eps_TEPZ)
