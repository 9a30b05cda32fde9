"""A tokenizer for others to use: called on a text it gives the ids that training saw."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from scale.data import tokenizer as tokenizers
from scale.data.tokenizer import Encoder, start_id
from scale.errors import ScaleError

PROBES = (
    "", " ", "the quick brown fox", " leading and trailing ", "two\nlines\n\n\tand a tab", "a  b   c    d",
    "def f(x):\n    return x + 1\n", "1234567890 3.14 -7", "caf\u00e9 cafe\u0301 na\u00efve", "\u4f60\u597d\uff0c\u4e16\u754c",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467", "don't  I'll WE'VE", "\u202eright\u202c \u00a0\ufeff", "x" * 300,
)  # fmt: skip
"""Texts on which tokenizers are known to differ: spaces, case, digits, composed letters, joined emoji."""


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a copy that puts the start token before a text, and neither cuts nor pads. Raises ScaleError if, loaded again,
    it does not give the ids of training."""
    copied = copy.deepcopy(tokenizer)
    backend = copied.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if _difference(copied, tokenizer) is not None:
        tokenizers.start_first(copied)
    copied.save_pretrained(folder)
    if _difference(tokenizers.load(str(folder)), tokenizer) is not None:
        _let_the_file_decide(folder)
    text = _difference(tokenizers.load(str(folder)), tokenizer)
    if text is not None:
        raise ScaleError(
            f"the tokenizer, saved and loaded again, gives other ids than in training, as of {text[:40]!r}"
        )


def _let_the_file_decide(folder: Path) -> None:
    """Some classes make parts of the tokenizer themselves; the plain class takes all of them from tokenizer.json."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space"):
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _difference(tokenizer: PreTrainedTokenizerFast, trained: PreTrainedTokenizerFast) -> str | None:
    """The first probe to which a tokenizer gives other ids than training did; None if there is none."""
    start = start_id(trained)
    for text, ids in zip(PROBES, Encoder(trained)(PROBES), strict=True):
        bare = ids[1:-1]
        if tokenizer(text).input_ids != [start, *bare] or tokenizer(text, add_special_tokens=False).input_ids != bare:
            return text
    return None if tokenizer.eos_token_id == trained.eos_token_id else str(trained.eos_token)
