"""Liger's fused kernels (arXiv 2410.10989) for rotary positions, norms and gated feed-forward layers."""

from __future__ import annotations

import logging

from torch import nn

from scale.hardware import installed


def liger_knows(model_type: str) -> bool:
    """Whether Liger has kernels for this Hugging Face model type; False where it is not installed."""
    if not installed("liger_kernel"):
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # slow: imports Triton

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def apply_liger(model_type: str) -> None:
    """Patch the classes of a model type. To be called before the model is built; CUDA only.

    The patch changes classes of transformers, so it holds for every model of this type in the process, and for good.
    Liger's losses are left out: `compute.loss` chunks the head, and Liger's fused one breaks torch.compile.
    """
    from liger_kernel.transformers import monkey_patch

    logging.getLogger(monkey_patch.__name__).setLevel(logging.WARNING)
    monkey_patch._apply_liger_kernel(model_type, cross_entropy=False, fused_linear_cross_entropy=False)


def has_liger(model: nn.Module) -> bool:
    """Whether a model was built after the patch. Its kernels read memory, which tensors on the meta device and those of a
    plan do not have: on a GPU an illegal access that ends the process."""
    return any(type(module).__module__.startswith("liger_kernel") for module in model.modules())
