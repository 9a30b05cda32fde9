"""Proof of an export: what it computes after loading is what the model in memory computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale.errors import ScaleError
from scale.models.modes import evaluating

ROUNDING = 1e-4
"""Largest difference of a logit, over the largest logit, that fp32 arithmetic in another order may make."""
_SMALLEST = 1e-3
"""Logits below it are compared as if they were as large."""
_ROWS, _LENGTH, _PROMPT, _NEW = 2, 32, 8, 12


@dataclass
class Look:
    """What a model makes of fixed ids: logits, and its greedy continuations."""

    logits_BLV: Tensor
    greedy: list[list[int]]


def look(model: Any) -> Look:
    """Of a model in fp32, on the device where it is. The model's own generation_config decides what ends a text."""
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    longest = min(_LENGTH, getattr(config, "max_position_embeddings", None) or _LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(0, config.vocab_size, (_ROWS, longest), generator=generator).to(device)
    with evaluating(model):
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits.float().cpu()
        greedy = [_greedy(model, row_L[: min(_PROMPT, longest // 2)], longest) for row_L in ids_BL]
    return Look(logits_BLV, greedy)


def _greedy(model: Any, prompt_L: Tensor, longest: int) -> list[int]:
    prompt_1L = prompt_L[None]
    new = min(_NEW, longest - prompt_1L.shape[1])
    made_1L = model.generate(
        input_ids=prompt_1L, attention_mask=torch.ones_like(prompt_1L), max_new_tokens=new, do_sample=False
    )
    ids: list[int] = made_1L[0, prompt_1L.shape[1] :].tolist()
    return ids


def compare(expected: Look, got: Look, what: str) -> None:
    """Raises ScaleError that says by how much `what` changed the logits, or that it changed the text."""
    if got.logits_BLV.shape != expected.logits_BLV.shape:
        raise ScaleError(f"{what}: logits of {got.logits_BLV.shape[-1]} tokens, {expected.logits_BLV.shape[-1]} before")
    known = expected.logits_BLV.isfinite()
    if not known.any():
        raise ScaleError(f"{what}: no logit is finite, so nothing can be compared")
    scale = expected.logits_BLV[known].abs().amax().clamp(min=_SMALLEST).item()
    if not torch.equal(known, got.logits_BLV.isfinite()):
        raise ScaleError(f"{what}: logits that are not finite")
    largest = (got.logits_BLV[known] - expected.logits_BLV[known]).abs().amax().item()
    if largest > ROUNDING * scale:
        raise ScaleError(f"{what}: logits differ by up to {largest:.2g} (the largest is {scale:.2g})")
    if got.greedy != expected.greedy:
        raise ScaleError(f"{what}: greedy generation differs: {got.greedy}, {expected.greedy} before")
