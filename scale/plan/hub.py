"""What a plan needs from the Hugging Face Hub. Light: looked at before torch is imported."""

from __future__ import annotations

from scale.config import PretrainRun
from scale.hub import need


def need_hub(config: PretrainRun) -> None:
    """Of what is on the Hub a plan reads the model's config, or the tokenizer that gives a preset its vocabulary. Raises
    UsageError where that cannot be had."""
    names = config.hub_names()
    first = "model.path" if config.model.path is not None else "data.tokenizer.path"
    need({first: names[first]} if first in names else {}, names.values())
