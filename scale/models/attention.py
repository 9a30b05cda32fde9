"""Which attention implementations a model's class supports, and the masks that one family does not make by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

_WITHOUT_POSITIONS = {"gpt_oss"}
"""Model types that do not hand their `position_ids` on to their masks, so that packed documents would see each other
(transformers 5.23)."""


def supported_attention(config: PretrainedConfig) -> tuple[str, ...]:
    """Values of compute.attention that the model of this config can compute, by the attributes of its class."""
    made = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if made is None:  # let building it say what is wrong
        return ("sdpa", "eager", "flex_attention", "flash_attention_2")
    model: Any = made[0] if isinstance(made, tuple) else made
    flash = getattr(
        model, "_compatible_flash_implementations", None
    )  # set where only some of them do (attention sinks)
    has = {
        "sdpa": model._supports_sdpa,
        "eager": True,
        "flex_attention": model._supports_flex_attn,
        "flash_attention_2": model._supports_flash_attn and (flash is None or "flash_attention_2" in flash),
    }
    return tuple(name for name, supported in has.items() if supported)


def takes_masks(model: nn.Module) -> bool:
    """Whether a model (also one with an adapter) is given masks for packed documents."""
    return getattr(getattr(model, "config", None), "model_type", None) in _WITHOUT_POSITIONS


def packed_masks(model: nn.Module, position_BL: Tensor) -> dict[str, Any]:
    """Further arguments of a forward pass over packed documents: masks, for models that make theirs without looking at
    `position_ids`; nothing for all others."""
    if not takes_masks(model):
        return {}
    config: Any = model.config
    weight = next(model.parameters())
    given = {
        "config": config,
        "inputs_embeds": weight.new_empty(
            *position_BL.shape, 0, device=position_BL.device
        ),  # asked for its shape alone
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_BL,
    }
    sliding = create_sliding_window_causal_mask(**given)
    return {"attention_mask": {"full_attention": create_causal_mask(**given), "sliding_attention": sliding}}
