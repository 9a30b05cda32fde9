"""Weights of a Hugging Face folder or repository, read from its safetensors files one parameter at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Size, Tensor, nn
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from scale.models.weight_files import files_of
from scale.protocols import Weights


def stored_weights(path: str, model: nn.Module) -> Weights | str:
    """A `Weights` for a meta model if its parameters are found in the files under their own names and shapes; otherwise
    the reason why not. Values are converted to fp32. Raises OSError for files that are not there."""
    made = next(_other_buffers(model), None)
    if made is not None:
        return f"its buffer {made} is made by code"
    tensors = _Tensors(path)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, shape in shapes.items():
        if name not in tensors.files:
            return f"its files have no {name}"
        if tensors.shape(name) != shape:
            return f"its files have {name} of shape {tensors.shape(name)}, the model of {shape}"
    surplus = sorted(tensors.files.keys() - known)
    if surplus:
        return f"its files have {surplus[0]}, the model does not"
    return tensors.read


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_dtype(path: str) -> torch.dtype:
    """The dtype of most of the numbers in a model's files; fp32 where that is none of fp32, bf16, fp16."""
    tensors = _Tensors(path)
    sizes: Counter[str] = Counter()
    for name, handle in tensors.files.items():
        sizes[handle.get_slice(name).get_dtype()] += math.prod(tensors.shape(name))
    most = max(sizes, key=lambda name: sizes[name], default="F32")
    return _DTYPES.get(most, torch.float32)


def _other_buffers(model: nn.Module) -> Iterator[str]:
    """Names of buffers beside the rotary frequencies, which `materialise` makes anew."""
    for prefix, module in model.named_modules():
        if "original_inv_freq" not in module._buffers:
            yield from (name for name, _ in module.named_buffers(prefix, recurse=False))


class _Tensors:
    """Which file holds which tensor; files stay open (memory-mapped) for as long as this is referenced."""

    def __init__(self, path: str):
        self._open = ExitStack()
        self.files: dict[str, Any] = {}
        for file in _files(path):
            handle = self._open.enter_context(safe_open(file, framework="pt"))
            self.files |= dict.fromkeys(handle.keys(), handle)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def read(self, name: str, shape: Size) -> Tensor:
        value: Tensor = self.files[name].get_tensor(name).float()
        return value


def _files(path: str) -> list[str]:
    """Local paths of a model's safetensors files; a repository's are downloaded into the cache first."""
    if Path(path).is_dir():
        return [str(file) for file in files_of(Path(path))]
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        return [str(cached_file(path, "model.safetensors"))]
    return list(get_checkpoint_shard_files(path, index)[0])
