"""torch.compile in place: parameter names, hooks and checkpoints stay what they were."""

from __future__ import annotations

from torch import nn


def compile_module(module: nn.Module, mode: str) -> None:
    """Compile the calls of a module. `mode` is off, default or max-autotune (without CUDA graphs, as row lengths change)."""
    if mode != "off":
        module.compile(mode=None if mode == "default" else "max-autotune-no-cudagraphs")
