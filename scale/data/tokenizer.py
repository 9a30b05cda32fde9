"""The tokenizer of a run: trained on its text, or loaded. Everything downstream sees a PreTrainedTokenizerFast."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale.data.files import one_line
from scale.errors import UsageError
from scale.hub import need

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 64_000_000
"""A BPE hardly changes beyond this much text, while training time and memory grow with it."""
_PIECE_CHARACTERS = 1 << 16


def train(
    texts: Iterable[str], vocab_size: int, max_bytes: int = TRAINING_BYTES, place: str = "data"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with up to `vocab_size` entries (fewer if the text runs out of pairs); the same text, the same result.

    Longer text is sampled evenly. Id 0 is <|endoftext|>. Raises UsageError, which names `place`, if there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    sample = sample_evenly(texts, max_bytes)
    if not sample:
        raise UsageError(f"{place}: holds no text to train a tokenizer of {vocab_size} entries on")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def sample_evenly(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Pieces of the texts, together at most `max_bytes` of UTF-8 plus one piece, spread evenly over all of them."""
    kept: list[str] = []
    size, stride = 0, 1
    for i, piece in enumerate(_pieces(texts)):
        if i % stride:
            continue
        kept.append(piece)
        size += len(piece.encode())
        while size > max_bytes and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(len(p.encode()) for p in kept)
    return kept


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _PIECE_CHARACTERS):
            yield text[start : start + _PIECE_CHARACTERS]


def load(path: str) -> PreTrainedTokenizerFast:
    """A tokenizer from a folder, a tokenizer.json or a Hugging Face name. Raises UsageError; never runs foreign code."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    local = Path(path).expanduser()
    if not local.exists() and (local.suffix == ".json" or path.startswith(("/", ".", "~"))):
        raise UsageError(f"{path}: no such file or folder (working folder {Path.cwd()})")
    need({"tokenizer": path})
    try:
        if local.suffix == ".json":
            settings = local.parent / "tokenizer_config.json"
            # tokenizer.json does not say which token ends a text; the settings beside it do
            tokenizer = (
                AutoTokenizer.from_pretrained(str(local.parent), trust_remote_code=False)
                if local.name == "tokenizer.json" and settings.is_file()
                else _with_known_eos(PreTrainedTokenizerFast(tokenizer_file=str(local)))
            )
        else:
            name = str(local) if local.is_dir() else path
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise UsageError(f"{path}: not a tokenizer that can be loaded ({one_line(error)})") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UsageError(f"{path}: {type(tokenizer).__name__} is not a fast tokenizer; convert it to tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"{path}: the tokenizer has no end-of-text token; set eos_token in the tokenizer_config.json beside it"
        )
    return tokenizer


def _with_known_eos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    if END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TEXT
    return tokenizer


def content_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hex digits over everything that decides the ids of a text; the same after saving and loading."""
    content = json.loads(_bare(tokenizer).to_str())
    content["post_processor"] = _without_start(content["post_processor"], tokenizer)
    content["start"], content["eos"] = start_id(tokenizer), tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def start_first(tokenizer: PreTrainedTokenizerFast) -> None:
    """Let the tokenizer put the start token before a text, behind what its post-processor does, unless that adds tokens."""
    from tokenizers import processors

    backend = tokenizer.backend_tokenizer
    adds = backend.encode("x", add_special_tokens=True).ids != backend.encode("x", add_special_tokens=False).ids
    kept = [backend.post_processor] if backend.post_processor is not None and not adds else []
    backend.post_processor = processors.Sequence([*kept, _start_processor(tokenizer)])


def _start_processor(tokenizer: PreTrainedTokenizerFast) -> TemplateProcessing:
    from tokenizers import processors

    start = start_id(tokenizer)
    token = str(tokenizer.convert_ids_to_tokens(start))
    one = [f"{token}:0", "$A:0"]
    return processors.TemplateProcessing(single=one, pair=[*one, f"{token}:1", "$B:1"], special_tokens=[(token, start)])


def _without_start(processor: dict[str, Any] | None, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any] | None:
    """The post-processor that a tokenizer had before `start_first`."""
    steps = processor["processors"] if processor is not None and processor["type"] == "Sequence" else []
    if not steps or steps[-1] != json.loads(_start_processor(tokenizer).__getstate__()):
        return processor
    return steps[0] if len(steps) == 2 else None


def start_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that every text begins with: beginning-of-text, or end-of-text (of the text before) where there is none."""
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return eos_id if bos_id is None else bos_id


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Largest id + 1: the rows that an embedding needs. Vocabularies may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


class Encoder:
    """Text to start token + ids + end-of-text, on all cores; a text that the tokenizer gives no id is an empty list.

    Without a start token no model would learn how a text begins.
    Text is only text: a special token spelled out in a document is not parsed as one. `unknown` counts what the vocabulary
    does not have: unknown tokens, and characters that a tokenizer without one leaves out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = _bare(tokenizer)
        self._tokenizer.encode_special_tokens = True
        self._start_id, self._eos_id = start_id(tokenizer), tokenizer.eos_token_id
        self._unknown_id, self._leaves_out = _unknown_id(tokenizer), _leaves_out(self._tokenizer)
        self.unknown = 0

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        encode = self._tokenizer.encode_batch if self._leaves_out else self._tokenizer.encode_batch_fast
        encodings = encode(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            if self._unknown_id is not None:
                self.unknown += encoding.ids.count(self._unknown_id)
            if self._leaves_out:
                self.unknown += _uncovered(text, encoding.offsets)
        return [[self._start_id, *encoding.ids, self._eos_id] if encoding.ids else [] for encoding in encodings]


def _unknown_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id of what the vocabulary does not have, as the model of the tokenizer knows it."""
    model = tokenizer.backend_tokenizer.model
    if type(model).__name__ == "Unigram":
        return tokenizer.unk_token_id
    token = getattr(model, "unk_token", None)
    return tokenizer.backend_tokenizer.token_to_id(token) if token else None


def _leaves_out(tokenizer: Tokenizer) -> bool:
    """Is it a BPE that has neither every byte nor a token for what it does not know?"""
    from tokenizers import models, pre_tokenizers

    model = tokenizer.model
    if not isinstance(model, models.BPE) or model.unk_token or model.byte_fallback:
        return False
    return not set(pre_tokenizers.ByteLevel.alphabet()) <= tokenizer.get_vocab().keys()


def _uncovered(text: str, offsets: Sequence[tuple[int, int]]) -> int:
    """Characters of a text, white space aside, that are in no token."""
    covered = {at for start, stop in offsets for at in range(start, stop)}
    return sum(1 for at, character in enumerate(text) if at not in covered and not character.isspace())


def _bare(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that neither cuts nor pads."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
