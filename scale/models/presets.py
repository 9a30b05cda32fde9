"""Shapes whose parameter count is true to the name (within 5%, held by a test): Llamas, and OpenAI's gpt-oss-20b.

100m, 500m and 1b share head_dim, query/KV ratio, vocabulary, tying and rope, and grow in every other dimension, so
that each can be expanded into the next without loss.
"""

from __future__ import annotations

from typing import Any

from transformers import GptOssConfig, LlamaConfig, PretrainedConfig

_GROWING: dict[str, Any] = {
    "vocab_size": 50_304, "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # vocab_size of tiny comes from the tokenizer
    "tiny": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
             "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 2048},
    "100m": {**_GROWING, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10,
             "num_attention_heads": 12, "num_key_value_heads": 3},
    "500m": {**_GROWING, "hidden_size": 1536, "intermediate_size": 4480, "num_hidden_layers": 16,
             "num_attention_heads": 24, "num_key_value_heads": 6},
    "1b": {**_GROWING, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "7b": {"vocab_size": 50_304, "hidden_size": 4096, "intermediate_size": 13_312, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
           "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    # 20.9B parameters, of which a token visits 3.6B; everything else as in transformers' GptOssConfig
    "gpt_oss_20b": {"vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
                    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
                    "num_experts_per_tok": 4, "sliding_window": 128, "tie_word_embeddings": False},
}  # fmt: skip
_FAMILIES: dict[str, type[PretrainedConfig]] = {"gpt_oss_20b": GptOssConfig}
"""Of presets that are no Llamas."""


def preset_config(name: str, vocab_size: int | None, overrides: dict[str, Any]) -> PretrainedConfig:
    """Hugging Face config of a preset. `vocab_size` is the tokenizer's, for presets that do not fix one."""
    fields = {"bos_token_id": None, "eos_token_id": None, **PRESETS[name], **overrides}
    if "vocab_size" not in fields:
        fields["vocab_size"] = -(-(vocab_size or 256) // 64) * 64  # matrix products like multiples of 64
    return _FAMILIES.get(name, LlamaConfig)(**fields)
