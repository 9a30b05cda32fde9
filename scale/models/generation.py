"""How a model generates: the settings of its base model, and which tokens begin and end a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from scale.config.model import ModelConfig
from scale.data.tokenizer import start_id
from scale.errors import UsageError

SETTINGS = "generation_config.json"


def base_settings(config: ModelConfig) -> dict[str, Any]:
    """Content of the base model's generation_config.json; empty if there is none, or if only its shape is used."""
    if config.path is None or config.init == "random":
        return {}
    found = cached_file(
        config.path,
        SETTINGS,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,  # offline a model that never had the file is in the cache without it
    )
    return {} if found is None else read_settings(Path(found))


def read_settings(file: Path) -> dict[str, Any]:
    """Content of a generation_config.json. Raises UsageError if it is no JSON object."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file}: is no JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{file}: holds no JSON object")
    return settings


def ends(tokenizer: PreTrainedTokenizerFast, known: int | list[int] | None) -> int | list[int]:
    """Ids that end a text: those known for the model, if the tokenizer's end-of-text is one of them; else that one alone.

    A chat model may end at several tokens. Ids of an architecture's default config mean nothing to another tokenizer.
    """
    eos: int = tokenizer.eos_token_id
    return known if isinstance(known, list) and eos in known else eos


def settings_for(tokenizer: PreTrainedTokenizerFast, base: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings of a model trained with this tokenizer: all of its base, with the tokens of its documents."""
    pad = base.get("pad_token_id")
    if pad is None:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    given = {key: value for key, value in base.items() if key != "_from_model_config"}
    tokens = {
        "bos_token_id": start_id(tokenizer),
        "eos_token_id": ends(tokenizer, base.get("eos_token_id")),
        "pad_token_id": pad,
    }
    return given | tokens
