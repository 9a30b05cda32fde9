"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards, or after an error, every submodule is in the mode that it had.

    Module by module, as `module.train()` would wake what was set to evaluation on its own (a frozen batch norm, say).
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(modes[0][1])  # parts may do more in `train` than to note the mode
        for part, training in modes:
            part.training = training
