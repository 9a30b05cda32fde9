"""DeepSpeed started quietly on this run's processes, and a model placed for it."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from scale.errors import MissingExtra, ScaleError
from scale.models.build import materialise, remake_rotary
from scale.parallel.ranks import Ranks
from scale.parallel.zero_config import Json
from scale.protocols import Weights


def start(ranks: Ranks) -> Any:
    """The deepspeed package, bound to the process group and the device of this run.

    Raises MissingExtra, or ScaleError if it was bound to another kind of device earlier.
    """
    kind = ranks.device.type
    os.environ["DS_ACCELERATOR"] = kind  # read once, when deepspeed is imported
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # which it insists on
    ranks.need_group()
    # torch's new names for what DeepSpeed calls: a line for every exchange
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__ as buildable
        from deepspeed.utils.logging import set_log_level_from_string
    except ImportError:
        raise MissingExtra("compute.strategy = 'deepspeed'", "deepspeed") from None
    set_log_level_from_string("error")
    bound = deepspeed.accelerator.get_accelerator().device_name()
    if bound != kind:
        raise ScaleError(f"compute.device is {kind}, but DeepSpeed is bound to {bound} (is DS_ACCELERATOR set?)")
    for op in ("deepspeed_shm_comm", "deepspeed_ccl_comm"):
        buildable[op] = False  # would compile for a minute, for what gloo does as well
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def place_whole(model: nn.Module, weights: Weights | None, device: torch.device) -> None:
    """Every rank holds the model (ZeRO-2)."""
    if weights is not None:
        materialise(model, weights, device)
    else:
        model.to(device)


def place_parts(model: nn.Module, weights: Weights | None, ranks: Ranks, config: Json, dtype: torch.dtype) -> None:
    """Fill one parameter after the other and keep this rank's part of it (ZeRO-3): no rank ever holds the whole model."""
    from deepspeed.runtime.zero.partition_parameters import Init

    init = Init(config_dict_or_path=config, dtype=dtype)
    made: dict[Tensor, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, param in list(module._parameters.items()):
            if param is None:
                continue
            if param not in made:  # tied ones come again
                value = param.data if weights is None else weights(f"{path}.{leaf}".lstrip("."), param.shape)
                made[param] = _filled(param, value.to(ranks.device, dtype))
                init._convert_to_zero_parameters([made[param]])
            module._parameters[leaf] = made[param]
        _place_buffers(module, ranks.device)


def _filled(param: nn.Parameter, value: Tensor) -> nn.Parameter:
    if param.is_meta:
        return nn.Parameter(value, requires_grad=param.requires_grad)
    param.data = value
    return param


def _place_buffers(module: nn.Module, device: torch.device) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
    remake_rotary(module, device)
