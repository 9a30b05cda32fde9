"""Text from a model: whole continuations, the same again for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from scale.data.tokenizer import start_id
from scale.errors import UsageError
from scale.models.generation import ends
from scale.models.modes import evaluating


@dataclass
class Continuation:
    """What a model made of one prompt."""

    prompt: str
    text: str
    """Without the prompt, and without the token that ends it."""
    tokens: int
    """How many were made, an end-of-text token included."""
    ended: bool
    """Whether the model ended the text itself, rather than being stopped at the most tokens."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> list[str]:
    """Continue each prompt as the beginning of a document. temperature 0 is greedy. Returns prompt + continuation."""
    made = continuations(model, tokenizer, prompts, max_new_tokens, temperature, top_k, seed)
    return [one.prompt + one.text for one in made]


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> list[Continuation]:
    """Continue each prompt as the beginning of a document, by these settings alone: of the model's own generation_config
    only the tokens that end a text count. temperature 0 is greedy, top_k 0 looks at all tokens.

    Raises UsageError for a prompt that leaves no room within the positions that the model has.
    """
    known = getattr(model.generation_config, "eos_token_id", None)
    ending = ends(tokenizer, known)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ending,
        pad_token_id=tokenizer.eos_token_id,
        **(
            {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature > 0 else {"do_sample": False}
        ),
    )
    every = [[start_id(tokenizer), *tokenizer(prompt, add_special_tokens=False).input_ids] for prompt in prompts]
    for ids in every:
        _check_room(model, len(ids), max_new_tokens)
    device = next(model.parameters()).device
    own, model.generation_config = model.generation_config, settings
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(model):
            torch.manual_seed(seed)
            made = [_continue(model, torch.tensor([ids], device=device)) for ids in every]
    finally:
        model.generation_config = own
    endings = set(ending) if isinstance(ending, list) else {ending}
    return [
        Continuation(prompt, _decoded(tokenizer, ids, new), len(new), bool(new) and new[-1] in endings)
        for prompt, ids, new in zip(prompts, every, made, strict=True)
    ]


def _continue(model: Any, ids_1L: torch.Tensor) -> list[int]:
    made_1L = model.generate(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L))
    new: list[int] = made_1L[0, ids_1L.shape[1] :].tolist()
    return new


def _decoded(tokenizer: Any, ids: list[int], new: list[int]) -> str:
    """Text of the new ids behind the others: some tokenizers drop a space at the beginning of what they decode."""
    before: str = tokenizer.decode(ids, skip_special_tokens=True)
    whole: str = tokenizer.decode(ids + new, skip_special_tokens=True)
    alone: str = tokenizer.decode(new, skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else alone


def _check_room(model: Any, prompt: int, new: int) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None or prompt + new <= most:
        return
    if prompt >= most:
        raise UsageError(
            f"--prompt: {prompt} tokens with the start token, but the model has {most} positions (shorten it)"
        )
    raise UsageError(
        f"--max-new-tokens {new}: behind a prompt of {prompt} tokens the model has {most - prompt} positions left "
        f"(use --max-new-tokens {most - prompt})"
    )
