"""Models with their stored weights: every parameter is found in the files, and every stored tensor is taken by one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from scale.errors import UsageError
from scale.models.weight_files import files_of


def pretrained(path: str, attention: str, say: Callable[[str], None] = print) -> nn.Module:
    """The causal language model of a folder or repository, in fp32.

    Raises UsageError where a parameter has no stored weight of its shape, or a stored weight no parameter. `say` hears of
    stored weights of parts that transformers' class knows and leaves out (multi-token prediction, say).
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print a table of what is told below in one line
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # or it only points to a report that it prints
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    model, found = loaded
    wrong = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if wrong:  # transformers has filled them at random
        raise UsageError(
            f"model.path = {path!r}: {len(wrong)} of its weights do not fit its config.json, the first is {wrong[0]}"
        )
    surplus = sorted(found["unexpected_keys"])
    if surplus:
        raise UsageError(
            f"model.path = {path!r}: {len(surplus)} stored weights belong to no parameter of the {type(model).__name__} that "
            f"its config.json describes, the first is {surplus[0]} (weights and config.json of two models?)"
        )
    left_out = _left_out(path, model)
    if left_out:
        say(
            f"model.path = {path!r}: {len(left_out)} stored tensors are not part of transformers' {type(model).__name__} and "
            f"are left out, the first is {left_out[0]}"
        )
    return model


def _left_out(path: str, model: Any) -> list[str]:
    """Stored tensors of a folder that transformers' class passes over by name."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    own = {*model.state_dict(), *(name for name, _ in model.named_buffers())}
    stored: set[str] = set()
    for file in files_of(Path(path)):
        with safe_open(file, framework="pt") as tensors:
            stored |= set(tensors.keys())
    return sorted(name for name in stored - own if any(pattern.search(name) for pattern in patterns))
