"""Fields of a Hugging Face config: which values cannot be, and which a run would ignore."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scale.errors import UsageError

Place = Callable[[str], str]
"""From a field to the words for where it stands, such as `model.overrides.hidden_act`."""

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation", "afn")
_READ_ELSEWHERE = {
    "model_type": "the model is of the type of model.preset or model.path",
    "architectures": "the model is the causal language model of its type",
    "dtype": "use compute.precision",
    "use_cache": "training and evaluation keep no cache of keys and values",
    "return_dict": "training needs no other output than it asks for",
    "output_hidden_states": "training needs no other output than it asks for",
    "output_attentions": "training needs no other output than it asks for",
    "transformers_version": "it is that of the package",
}
"""Fields of Hugging Face configs that say nothing about the model that is trained, and why."""
_RATE = re.compile(r"(^|_)(dropout|pdrop|dropout_prob|dropout_rate|layerdrop)$")


def check_fields(fields: Mapping[str, Any], place: Place) -> None:
    """Raises UsageError for values that no model can have."""
    for key, value in fields.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in _SIZES and number and value < 1:
            raise UsageError(f"{place(key)} = {value}: should be 1 or more")
        if _RATE.search(key) and number and not 0 <= value <= 1:
            raise UsageError(f"{place(key)} = {value}: should be a rate from 0 to 1")
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            name = value.removeprefix("torch.")
            if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
                raise UsageError(f"{place(key)} = {value!r}: torch has no such type (use float32, bfloat16 or float16)")
    pad, vocabulary = fields.get("pad_token_id"), fields.get("vocab_size")
    if isinstance(pad, int) and isinstance(vocabulary, int) and pad >= vocabulary:
        raise UsageError(f"{place('pad_token_id')} = {pad}: the vocabulary has {vocabulary} entries (use null)")


def misfit(fields: Mapping[str, Any], place: Place) -> str | None:
    """Why a model of these fields cannot be made or run, in words; None where nothing known is wrong."""
    for key in _ACTIVATIONS:
        value = fields.get(key)
        if isinstance(value, str) and value not in ACT2FN:
            near = get_close_matches(value, list(ACT2FN), 1)
            known = f"did you mean {near[0]!r}?" if near else "such as silu, gelu, relu"
            return f"{place(key)} = {value!r}: transformers has no such activation ({known})"
    for key, kind in _rope_types(fields):
        if kind not in ROPE_INIT_FUNCTIONS and kind != "default":
            return f"{place(key)}: rope_type = {kind!r}: should be one of default, {', '.join(ROPE_INIT_FUNCTIONS)}"
    hidden, heads, shared, width = (
        fields.get(key) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if isinstance(heads, int) and isinstance(hidden, int) and hidden % heads:
        return f"{place('num_attention_heads')} = {heads}: should divide hidden_size = {hidden}"
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        return f"{place('num_key_value_heads')} = {shared}: should divide num_attention_heads = {heads}"
    if isinstance(width, int) and width % 2:
        return f"{place('head_dim')} = {width}: should be even, as rotary positions turn pairs"
    return None


def reason(error: Exception, fields: Mapping[str, Any], place: Place) -> str | None:
    """The words of a validator of transformers, with the place of the field they are about; None where they name no field."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    found = re.search(r"[Vv]alidation error for (?:field '(\w+)'|validator '\w+'): \w+: (.*)", text)
    key, said = found.groups() if found else (None, text)
    key = key or next((name for name in re.findall(r"`(\w+)`", said) if name in fields), None)
    if key is None:
        return None
    said = re.sub(r"^Field '\w+' (with value .*?(?=doesn't))?| \(value: .*\)$", "", said.partition(" Errors: ")[0])
    return f"{place(key)} = {fields.get(key)!r}: {textwrap.shorten(said, 300, placeholder=' ...')}"


def _rope_types(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in ("rope_parameters", "rope_scaling"):
        value = fields.get(key)
        if isinstance(value, Mapping):
            for part in (value, *(inner for inner in value.values() if isinstance(inner, Mapping))):
                kind = part.get("rope_type", part.get("type"))
                if isinstance(kind, str):
                    yield key, kind


def check_ignored(built: PretrainedConfig, overrides: Mapping[str, Any], place: Place) -> None:
    """Raises UsageError for fields that were asked for and that nothing would read."""
    for key, instead in _READ_ELSEWHERE.items():
        if key in overrides:
            raise UsageError(f"{place(key)} = {overrides[key]!r}: is not read ({instead})")
