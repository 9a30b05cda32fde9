"""A causal language model in two parts: the decoder, and the head that turns its hidden states into logits."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

_LOGITS = re.compile(r"^\s*(?:lm_)?logits [-+*/]?= ", re.MULTILINE)
_PLAIN = re.compile(r"^\s*logits = self\.lm_head\(hidden_states(?:\[:, slice_indices, :\])?\)$", re.MULTILINE)


def decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The part whose `last_hidden_state` the head multiplies, and the head; adapters inside the decoder stay in force.

    Only for models without an `obstacle`.
    """
    plain = without_adapter(model)
    return plain.get_decoder(), plain.get_output_embeddings()


def obstacle(model: nn.Module) -> str | None:
    """Why logits are more (or not known to be just) `head(hidden states)`; None if nothing speaks against it.

    Families scale or cap their logits under many names (Gemma, Cohere, Granite, Falcon-H1), so the forward itself is read:
    its only statement about logits must be the call of the head.
    """
    plain = without_adapter(model)
    name = type(plain).__name__
    head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    if type(head) is not nn.Linear or head is not getattr(plain, "lm_head", None):
        return f"{name} has no plain linear head of its own"
    if plain.get_decoder() is plain:
        return f"{name} has no decoder apart from its head"
    try:
        source = inspect.getsource(inspect.unwrap(type(plain).forward))
    except (OSError, TypeError):
        return f"the source of {name} cannot be read"
    if len(_LOGITS.findall(source)) != 1 or not _PLAIN.search(source):
        return f"{name} does more to its logits than to multiply by its head"
    return None


def without_adapter(model: nn.Module) -> Any:
    """The model itself, also inside of an adapter's wrapper."""
    plain: Any = model
    return plain.get_base_model() if hasattr(plain, "get_base_model") else plain
