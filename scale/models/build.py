"""From `model:` to a module: architecture first (on the meta device), weights parameter by parameter afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from scale.config.model import ModelConfig
from scale.errors import UsageError
from scale.models.kernels import has_liger
from scale.models.presets import preset_config
from scale.models.size import experts_of
from scale.models.stored import stored_weights
from scale.protocols import Weights

_SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "max_position_embeddings"}  # fmt: skip
_WRITERS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
"""Matrices that write to the residual stream."""


def model_config(config: ModelConfig, vocab_size: int | None = None) -> PretrainedConfig:
    """The Hugging Face config that `model:` describes. Raises UsageError for unknown overrides or an unreadable path."""
    if config.preset is not None:
        built = _checked(lambda: preset_config(config.preset, vocab_size, config.overrides), config)
    else:
        assert config.path is not None
        _check_path(config.path, config.init != "random")
        built = _checked(lambda: AutoConfig.from_pretrained(config.path, trust_remote_code=False), config)
    unknown = [key for key in config.overrides if key not in type(built)().to_dict()]
    if unknown:
        raise UsageError(f"model.overrides.{unknown[0]}: {type(built).__name__} has no such field")
    for key, value in config.overrides.items():
        if key in _SIZES and isinstance(value, int) and value < 1:
            raise UsageError(f"model.overrides.{key} = {value}: should be 1 or more")
    if config.path is not None and config.overrides:  # only fields of the class: never options of from_pretrained
        built = _checked(lambda: type(built).from_dict({**built.to_dict(), **config.overrides}), config)
    return built


def _check_path(path: str, with_weights: bool) -> None:
    """Plain words for what transformers calls a bad repository name. Raises UsageError."""
    folder = Path(path)
    if path.startswith(("/", ".", "~")) and not folder.is_dir():
        raise UsageError(f"model.path = {path!r}: no such folder (working folder {Path.cwd()})")
    if with_weights and is_model_folder(folder) and not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"model.path = {path!r}: holds no .safetensors file; others (pytorch_model.bin) may run code when opened and "
            "are not read: save the model again with save_pretrained"
        )


def _checked(make: Any, config: ModelConfig) -> Any:
    try:
        return make()
    except Exception as error:  # transformers and its validators raise of every kind
        what = f"model.path = {config.path!r}" if config.path else f"model.overrides = {config.overrides}"
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise UsageError(f"{what}: {kind}{' '.join(str(error).split())[:300]}") from None


def build_model(
    config: ModelConfig,
    hf_config: PretrainedConfig,
    attention: str,
    seed: int,
    lazy: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[nn.Module, Weights | None]:
    """A model and where its weights come from.

    Presets are made on the meta device, with a `Weights` that draws each parameter from its own seeded generator: the
    values do not depend on how the model is sharded. Pretrained models come loaded (`Weights` is None), unless `lazy`
    asks for a meta model as well, with a `Weights` that reads its files parameter by parameter; where those do not fit
    the model's parameters one to one, `say` hears why, and the model comes loaded.
    """
    path = config.path
    if path is not None and config.init != "random":
        if lazy:
            model = _meta(config, hf_config, attention)
            stored = _checked(lambda: stored_weights(path, model), config)
            if not isinstance(stored, str):
                return model, stored
            say(f"model.path = {path!r}: every rank loads the whole model ({stored})")
        return _checked(lambda: _pretrained(path, attention), config), None
    if config.preset is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _checked(lambda: _from_config(hf_config, attention), config), None
    model = _meta(config, hf_config, attention)
    runs_on_meta = not experts_of(hf_config)[0] and not has_liger(model)  # a router needs values to choose by
    if attention in ("sdpa", "eager") and runs_on_meta:
        with torch.device("meta"):
            _checked(lambda: _try_shapes(model), config)
    return model, llama_init(seed, hf_config.initializer_range, hf_config.num_hidden_layers)


def _pretrained(path: str, attention: str) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # or it only points to a report that it prints
        output_loading_info=True,
    )
    model, found = loaded
    wrong = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if wrong:  # transformers has filled them at random
        raise ValueError(f"{len(wrong)} of its weights do not fit its config.json, the first is {wrong[0]}")
    return model


def _meta(config: ModelConfig, hf_config: PretrainedConfig, attention: str) -> Any:
    with torch.device("meta"):
        return _checked(lambda: _from_config(hf_config, attention), config)


def _from_config(hf_config: PretrainedConfig, attention: str) -> Any:
    return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation=attention)


def _try_shapes(model: nn.Module) -> None:
    """A forward pass without memory: sizes and rates that do not go together show before the run begins."""
    ids_BL = torch.zeros(1, 2, dtype=torch.long)
    model(
        input_ids=ids_BL, position_ids=ids_BL, attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool), use_cache=False
    )


def llama_init(seed: int, std: float, layers: int) -> Weights:
    """Normal(0, std) matrices and attention sinks, unit norms, zero biases; matrices that write to the residual stream are
    divided by sqrt(2 layers) (GPT-2)."""

    def weights(name: str, shape: Size) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1 and not name.endswith("sinks"):
            return torch.ones(shape)
        scale = (2 * layers) ** -0.5 if name.endswith(_WRITERS) else 1.0
        generator = torch.Generator().manual_seed(_seed_of(seed, name))
        return torch.empty(shape).normal_(0.0, std * scale, generator=generator)

    return weights


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")


Put = Callable[[Tensor, Tensor], Any]
"""Writes a parameter's full value into what this process holds of the parameter: (parameter, full value)."""


def materialise(model: nn.Module, weights: Weights, device: torch.device, put: Put = Tensor.copy_) -> None:
    """Give a meta model memory on `device`, fill its parameters one by one and make its rotary buffers anew."""
    names: dict[Tensor, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    model.to_empty(device=device)
    for first, *tied in names.values():  # `to_empty` makes each of them a parameter of its own
        for name in tied:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
    with torch.no_grad():
        for name, param in model.named_parameters():
            put(param, weights(name, param.shape))
    for module in model.modules():
        remake_rotary(module, device)


def remake_rotary(module: nn.Module, device: torch.device) -> None:
    """Rotary frequencies are buffers outside the state dict: `to_empty` leaves garbage in them."""
    if "original_inv_freq" in module._buffers:
        with torch.device(device):
            fresh: nn.Module = type(module)(module.config)
        for name, buffer in fresh.named_buffers():
            module.register_buffer(name, buffer, persistent=False)


def set_recompute(model: nn.Module, every: int) -> int:
    """Activation checkpointing of every `every`-th decoder layer; returns how many layers it covers."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(f"compute.recompute = {every}: {type(model).__name__} does not support it (use off)")
    again = partial(checkpoint, use_reentrant=False)
    for layer in layers[::every]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = again  # what transformers' own switch sets, on all layers
    return len(layers[::every])


def is_model_folder(path: str | Path) -> bool:
    """Whether a path holds a Hugging Face model."""
    return (Path(path) / "config.json").is_file()
