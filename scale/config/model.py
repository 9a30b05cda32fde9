"""Which model, and which of its weights are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from scale.config.base import NUMBER, Count, Positive, Strict, exactly_one

Preset = Literal["tiny", "100m", "500m", "1b", "7b", "gpt_oss_20b"]


class ModelConfig(Strict):
    """A preset (random weights) or any Hugging Face causal language model."""

    preset: Preset | None = None
    """A Llama of this size (tiny, 100m, 500m, 1b, 7b), or the mixture of experts gpt_oss_20b."""
    path: str | None = None
    """Hugging Face name or local folder (safetensors only)."""
    init: Literal["auto", "pretrained", "random"] = "auto"
    """auto: random for a preset, pretrained for a path. random with a path uses only its config.json."""
    overrides: dict[str, Any] = {}
    """Fields of the Hugging Face config to change, e.g. {num_hidden_layers: 2}."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        exactly_one(self, "preset", "path")
        if self.preset is not None and self.init == "pretrained":
            raise ValueError("init: a preset has no pretrained weights (use model.path)")
        if self.init != "random" and self.path is not None and self.overrides:
            raise ValueError("overrides: would not fit pretrained weights (use init: random)")
        return self


class LoraConfig(Strict):
    """Low-rank adapters (LoRA, arXiv 2106.09685) through peft; the base weights stay frozen."""

    kind: Literal["lora"]
    """The method."""
    rank: Count = 16
    """Rank of the update of each matrix."""
    alpha: Positive = 32
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, NUMBER, Field(ge=0, lt=1)] = 0.0
    """On the input of the adapters."""
    targets: Annotated[list[str], Field(min_length=1)] = [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    """Names of the linear modules that get an adapter; each must exist in the model."""


AdapterConfig = Annotated[LoraConfig, Field()]
