"""Text from a model: whole continuations, the same again for the same seed."""

from __future__ import annotations

from typing import Any

import torch

from scale.data.tokenizer import start_id
from scale.models.modes import evaluating


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
    eos = tokenizer.eos_token_id
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature > 0 else {"do_sample": False}
    )
    out = []
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(model):
        torch.manual_seed(seed)
        for prompt in prompts:
            ids = [start_id(tokenizer), *tokenizer(prompt, add_special_tokens=False).input_ids]
            ids_BL = torch.tensor([ids], device=device)
            out_BL = model.generate(
                ids_BL,
                attention_mask=torch.ones_like(ids_BL),
                max_new_tokens=max_new_tokens,
                eos_token_id=eos,
                pad_token_id=eos,
                **sampling,
            )
            out.append(tokenizer.decode(out_BL[0], skip_special_tokens=True))
    return out
