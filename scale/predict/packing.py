"""Tensors and arrays as JSON, exactly: base64 of their bytes, with type and shape."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pack_array(array: np.ndarray) -> dict[str, Any]:
    """JSON of a numeric array; `unpack_array` gives the same bits."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def unpack_array(packed: dict[str, Any]) -> np.ndarray:
    """A new array. Raises ValueError if bytes, type and shape do not fit, or the type is not a plain number."""
    dtype = np.dtype(packed["dtype"])
    if dtype.kind not in "biufc":
        raise ValueError(f"packed array of type {dtype}: only numbers are unpacked")
    flat = np.frombuffer(base64.b64decode(packed["data"]), dtype)
    return flat.reshape(packed["shape"]).copy()


def pack(tensor: Tensor) -> dict[str, Any]:
    """JSON of a tensor, wherever it lives. bf16 travels as its bits."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return pack_array(tensor.view(torch.int16).numpy()) | {"bf16": True}
    return pack_array(tensor.numpy())


def unpack(packed: dict[str, Any]) -> Tensor:
    """A new CPU tensor with the bits that were packed. Errors as `unpack_array`."""
    tensor = torch.from_numpy(unpack_array(packed))
    return tensor.view(torch.bfloat16) if packed.get("bf16") else tensor
