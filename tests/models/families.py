"""Every causal language model of transformers that can be made tiny."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "d_model": 32, "n_embd": 32, "n_layer": 2,
    "n_layers": 2, "n_head": 4, "n_heads": 4, "n_positions": 64, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "ffn_dim": 48,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 1, "embedding_size": 32,
    "word_embed_proj_dim": 32, "sliding_window": 16, "is_decoder": True, "use_cache": False, "rotary_dim": 4, "emb_dim": 32,
    "attention_head_dim": 8, "dim": 32, "ffn_hidden_size": 48,
}  # fmt: skip
LARGEST = 3_000_000
"""Parameters of what still counts as tiny."""


def tiny_config(name: str, **more: Any) -> PretrainedConfig:
    """The config of a model type with what `SMALL` says, as far as it has these fields."""
    known = CONFIG_MAPPING[name]().to_dict()
    return CONFIG_MAPPING[name](**{key: value for key, value in SMALL.items() if key in known} | more)


def tiny_model(name: str, seed: int = 0, **more: Any) -> nn.Module:
    """A model of this type with random weights, in fp32 on the CPU."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(tiny_config(name, **more), dtype=torch.float32)
    return model.eval()


def families() -> Iterator[tuple[str, nn.Module]]:
    """Model types and models on the meta device; those that have no tiny form by these fields are left out."""
    logging.set_verbosity_error()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
        except Exception:  # every class refuses in its own way
            continue
        if sum(p.numel() for p in model.parameters()) <= LARGEST:
            yield name, model
