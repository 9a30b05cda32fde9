"""Large matrix products in 8-bit floating point (arXiv 2209.05433): which ones, converted by torchao or Transformer Engine.

A converted module keeps its parameters under their names, so checkpoints and exports do not know of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scale.config.run import Fp8Config
from scale.errors import MissingExtra, UsageError
from scale.hardware import installed

_MARK = "_computes_in_fp8"
_PACKAGES = {"torchao": "torchao", "te": "transformer_engine"}


@dataclass(frozen=True)
class Converted:
    """Names of the linear modules that compute in FP8, and of the matrices that do not, with the reason."""

    names: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        reasons: dict[str, int] = {}
        for reason in self.left.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        rest = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        return f"{len(self.names)} matrices in FP8, others not: {rest or 'none'}"


def backend(config: Fp8Config) -> str | None:
    """torchao or te, as asked for or as installed; None if it is not installed."""
    wanted = ["torchao", "te"] if config.backend == "auto" else [config.backend]
    return next((name for name in wanted if installed(_PACKAGES[name])), None)


def candidates(model: nn.Module, config: Fp8Config) -> Converted:
    """Which linear modules would be converted, and why the other matrices would not."""
    named: Any = model
    head = named.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names, left = [], {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            left[name] = "embedding"
        elif isinstance(module, nn.Linear):
            reason = "output head" if module is head else _too_small(module, config.smallest)
            if reason is None:
                names.append(name)
            else:
                left[name] = reason
        left |= {f"{name}.{own}": "of experts" for own, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return Converted(tuple(names), left)


def _too_small(linear: nn.Linear, smallest: int) -> str | None:
    if min(linear.weight.shape) < smallest:
        return f"with a side below {smallest}"
    if linear.in_features % 16 or linear.out_features % 16:
        return "with a side that is no multiple of 16"
    return None


def matrix_shapes(model: nn.Module, config: Fp8Config) -> dict[tuple[int, int], int]:
    """(out, in) of the matrices that would be converted -> how many there are."""
    chosen = set(candidates(model, config).names)
    shapes: dict[tuple[int, int], int] = {}
    for name, module in model.named_modules():
        if name in chosen and isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
            shapes[shape] = shapes.get(shape, 0) + 1
    return shapes


def convert(model: nn.Module, config: Fp8Config, fp8_gather: bool = False) -> Converted:
    """Replace modules in place, before the model is sharded and compiled; weights may still be on the meta device.

    `fp8_gather`: FSDP2 gathers the weights in FP8 (torchao, tensorwise). Raises UsageError if nothing would be converted,
    MissingExtra without a backend.
    """
    chosen = candidates(model, config)
    if not chosen.names:
        raise UsageError(
            f"compute.precision = 'fp8': no linear module of this model has sides of compute.fp8.smallest = "
            f"{config.smallest} or more that are multiples of 16 (use bf16)"
        )
    which = backend(config)
    if which is None:
        raise MissingExtra(
            f"compute.precision = 'fp8' (backend {config.backend})", "te" if config.backend == "te" else "fp8"
        )
    if which == "te":
        _convert_te(model, config, chosen)
    else:
        convert_torchao(model, config, set(chosen.names), fp8_gather)
    for name in chosen.names:
        setattr(model.get_submodule(name), _MARK, True)
    return chosen


@contextmanager
def exact_products(model: nn.Module) -> Iterator[None]:
    """Converted modules compute as plain ones for a while. In FP8 the rows of a tensor share a scale, so that each document
    moves the rounding of all others: not what a probe for leaks is after."""
    converted: list[Any] = [module for module in model.modules() if getattr(module, _MARK, False)]
    for module in converted:
        module.forward = partial(_plain, module)
    try:
        yield
    finally:
        for module in converted:
            del module.forward


def _plain(module: Any, x: Tensor) -> Tensor:
    bias = module.bias if module.bias is not None and module.bias.numel() else None  # te's is empty where there is none
    weight = module.weight
    if hasattr(weight, "to_original_precision"):  # gathered in FP8
        weight = weight.to_original_precision()
    return F.linear(x, weight, bias)


def convert_torchao(model: nn.Module, config: Fp8Config, names: set[str], fp8_gather: bool = False) -> None:
    """Replace the linear modules of these names by torchao's."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = replace(
        Float8LinearConfig.from_recipe_name(config.recipe),
        emulate=config.emulate,
        pad_inner_dim=True,  # a micro-batch need not have a multiple of 16 tokens
        enable_fsdp_float8_all_gather=fp8_gather and config.recipe == "tensorwise",
    )
    convert_to_float8_training(model, config=recipe, module_filter_fn=lambda _, name: name in names)


def _convert_te(model: nn.Module, config: Fp8Config, chosen: Converted) -> None:
    """Untested: no card with FP8 has run it."""
    if config.recipe != "tensorwise" or config.emulate:
        option = "emulate = true" if config.emulate else f"recipe = {config.recipe!r}"
        raise UsageError(
            f"compute.fp8.{option}: Transformer Engine has no such mode here (use compute.fp8.backend=torchao)"
        )
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import Float8CurrentScaling
    except (ImportError, RuntimeError) as error:  # without CUDA it raises RuntimeError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"compute.fp8.backend = 'te': Transformer Engine cannot be used ({reason})") from None
    recipe = Float8CurrentScaling()  # keeps no history of scales, so that a checkpoint need not either

    class Linear(te.Linear):
        get_extra_state = nn.Module.get_extra_state  # no key of its own in the state dict

        def forward(self, x: Any) -> Any:
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                return super().forward(x)

    for name in chosen.names:
        old: Any = model.get_submodule(name)
        new = Linear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
        new.weight, new.bias = old.weight, old.bias if old.bias is not None else new.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
