"""Kinds of weights: parameters of the same part of a network move alike, whatever their layer.

Fused projections have one kind: query-key-value counts as q, gate-and-up as up.
"""

from __future__ import annotations

import re

KINDS = ("embed", "q", "k", "v", "o", "gate", "up", "down", "norm", "head", "rest")

_MODULES = {
    "embed": "embed_tokens embed_positions embed_in wte wpe word_embeddings position_embeddings tok_embeddings",
    "q": "q_proj query wq c_attn query_key_value qkv_proj Wqkv qkv",
    "k": "k_proj key wk",
    "v": "v_proj value wv",
    "o": "o_proj out_proj wo",
    "gate": "gate_proj w1",
    "up": "up_proj c_fc fc1 fc_in w3 dense_h_to_4h gate_up_proj",
    "down": "down_proj fc2 fc_out w2 dense_4h_to_h",
    "head": "lm_head embed_out",
}
_KIND_OF_MODULE = {module: kind for kind, modules in _MODULES.items() for module in modules.split()}
_NORM = re.compile(r"norm|(?:^|_)ln(?:_|$)", re.IGNORECASE)
_INSIDE_MODULE = re.compile(r"^(?:weight|bias|default|base_layer|modules_to_save|original_module|lora_.*|\d+)$")


def kind_of(name: str) -> int:
    """Index in KINDS of a parameter by its name; biases and adapters go with their module, what is unknown is "rest".

    Knows the names of Llama-like models, GPT-2, GPT-NeoX, BLOOM, OPT, Mixtral and Phi-3. A tied head is an embedding.
    """
    modules = [part for part in name.split(".") if not _INSIDE_MODULE.match(part)]
    for depth in reversed(range(len(modules))):
        kind = _kind_of_module(modules[depth], modules[depth - 1] if depth else "")
        if kind is not None:
            return KINDS.index(kind)
    return KINDS.index("rest")


def _kind_of_module(module: str, parent: str) -> str | None:
    if module in _KIND_OF_MODULE:
        return _KIND_OF_MODULE[module]
    if _NORM.search(module):
        return "norm"
    attention = "att" in parent.lower()
    if module == "c_proj":
        return "o" if attention else "down"
    if module == "dense" and attention:
        return "o"
    return None
