"""LoRA through peft. The base stays frozen; only adapter weights are trained, saved and exported."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from scale.config.model import LoraConfig
from scale.errors import UsageError


def add_adapter(model: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """Wrap the model with LoRA. Raises UsageError naming targets that match no linear module (peft would pass over them)."""
    from peft import LoraConfig as PeftLora  # a slow import that most runs do not need
    from peft import get_peft_model

    linear = {name.rsplit(".", 1)[-1]: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    missing = [t for t in config.targets if t not in linear]
    if missing:
        raise UsageError(
            f"adapter.targets: {missing[0]!r} is no linear module here (there are: {', '.join(sorted(linear))})"
        )
    full = max(min(linear[t].weight.shape) for t in config.targets)
    if config.rank > full:
        raise UsageError(f"adapter.rank = {config.rank}: the matrices of adapter.targets have a rank of at most {full}")
    lora = PeftLora(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft scales by alpha / r, floats included
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        task_type="CAUSAL_LM",
    )
    # peft asks transformers by a name that is about to go; nothing a user could mend
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, lora)


def merge_adapter(model: Any) -> nn.Module:
    """The base model with the adapter's updates added to its matrices, in place.

    An update of a head that shares its matrix with the input embedding unties the two first: the embedding must not change.
    """
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    inner = getattr(head, "base_layer", None)
    if inner is not None and inner.weight is embedding.weight:
        inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False
    merged: nn.Module = model.merge_and_unload()
    return merged
