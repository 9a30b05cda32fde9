"""From `model:` to a module: architecture first (on the meta device), weights parameter by parameter afterwards."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scale.config.model import ModelConfig
from scale.errors import UsageError
from scale.models.hf_config import checked
from scale.models.kernels import has_liger
from scale.models.pretrained import pretrained
from scale.models.size import experts_of
from scale.models.stored import stored_weights
from scale.protocols import Weights

_ROPE_BY_VALUE = ("dynamic", "longrope")
"""Rotary positions that look at the values of positions in each forward pass."""
_WRITERS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
"""Matrices that write to the residual stream."""


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
    the model's parameters one to one, `say` hears why, and the model comes loaded. Raises UsageError for a model that
    cannot be made or run, and for weights that do not fit it. Every row of the input embedding learns.
    """
    model, weights = _build(config, hf_config, attention, seed, lazy, say)
    free_padding(model)
    return model, weights


def _build(
    config: ModelConfig,
    hf_config: PretrainedConfig,
    attention: str,
    seed: int,
    lazy: bool,
    say: Callable[[str], None],
) -> tuple[nn.Module, Weights | None]:
    path = config.path
    if path is not None and config.init != "random":
        if lazy:
            model = _meta(config, hf_config, attention)
            stored = checked(lambda: stored_weights(path, model), config, hf_config)
            if not isinstance(stored, str):
                return model, stored
            say(f"model.path = {path!r}: every rank loads the whole model ({stored})")
        return checked(lambda: pretrained(path, attention, say), config, hf_config), None
    if config.preset is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = checked(lambda: _from_config(hf_config, attention), config, hf_config)
            fill_padding(model)
        if attention in ("sdpa", "eager") and not has_liger(model):
            checked(lambda: _try_shapes(model, "cpu"), config, hf_config)
        return model, None
    model = _meta(config, hf_config, attention)
    runs_on_meta = not experts_of(hf_config)[0] and not has_liger(model)  # a router needs values to choose by
    if attention in ("sdpa", "eager") and runs_on_meta:
        trial = model
        if _rope_type(hf_config) in _ROPE_BY_VALUE:
            plain = copy.deepcopy(hf_config)
            plain.rope_parameters = {**hf_config.rope_parameters, "rope_type": "default"}
            trial = _meta(config, plain, attention)
        with torch.device("meta"):
            checked(lambda: _try_shapes(trial, "meta"), config, hf_config)
    return model, llama_init(seed, hf_config.initializer_range, hf_config.num_hidden_layers)


def free_padding(model: nn.Module) -> None:
    """Let every row of the input embedding learn. `padding_idx` keeps the gradient of one row at zero, and that row is often
    the token that ends or starts a document; nothing of a batch is padding by its id here."""
    embedding = _input_embedding(model)
    if embedding is not None:
        embedding.padding_idx = None


def fill_padding(model: Any) -> None:
    """Draw the row that transformers leaves at zero because of `padding_idx`, with the spread of the others."""
    embedding = _input_embedding(model)
    if embedding is not None and embedding.padding_idx is not None:
        row_D = embedding.weight.detach()[embedding.padding_idx]
        nn.init.normal_(row_D, std=float(torch.std(embedding.weight.detach())))


def _input_embedding(model: Any) -> nn.Embedding | None:
    found = model.get_input_embeddings()
    return found if isinstance(found, nn.Embedding) else None


def _meta(config: ModelConfig, hf_config: PretrainedConfig, attention: str) -> Any:
    with torch.device("meta"), _rope_on_cpu():
        return checked(lambda: _from_config(hf_config, attention), config, hf_config)


@contextmanager
def _rope_on_cpu() -> Iterator[None]:
    """Some kinds of rotary frequencies look at values while the model is made: inside, all are computed on the CPU.
    `materialise` makes them anew."""
    before = dict(ROPE_INIT_FUNCTIONS)

    def on_cpu(compute: Callable[..., Any]) -> Callable[..., Any]:
        def frequencies(config: Any, device: Any = None, *args: Any, **options: Any) -> Any:
            with torch.device("cpu"):
                return compute(config, torch.device("cpu"), *args, **options)

        return frequencies

    try:
        ROPE_INIT_FUNCTIONS.update({name: on_cpu(compute) for name, compute in before.items()})
        yield
    finally:
        ROPE_INIT_FUNCTIONS.update(before)


def _rope_type(hf_config: PretrainedConfig) -> str | None:
    rope: Any = getattr(hf_config, "rope_parameters", None)
    return rope.get("rope_type") if isinstance(rope, dict) else None


def _from_config(hf_config: PretrainedConfig, attention: str) -> Any:
    return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation=attention)


def _try_shapes(model: nn.Module, device: str) -> None:
    """A forward pass of two tokens, on the meta device without memory: sizes and rates that do not go together show before
    the run begins."""
    ids_BL = torch.zeros(1, 2, dtype=torch.long, device=device)
    mask = {} if device != "meta" else {"attention_mask": torch.ones(1, 1, 2, 2, dtype=torch.bool)}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model(input_ids=ids_BL, position_ids=ids_BL, use_cache=False, **mask)


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
