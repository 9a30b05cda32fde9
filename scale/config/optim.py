"""How the weights move: optimizer, learning-rate schedule, batch, length of the run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from scale.config.base import NUMBER, Count, Fraction, NonNegative, Positive, Strict, exactly_one

Beta = Annotated[float, NUMBER, Field(ge=0, lt=1)]


class OptimConfig(Strict):
    """Weight decay applies to what multiplies activations (matrices, experts, the head), never to norms, biases, embeddings or
    other vectors, however many dimensions they have."""

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """muon: Muon for the matrices inside the blocks, AdamW for embeddings, head, experts and all that is not decayed."""
    lr: Positive = 3e-4
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running mean and of the running square of the gradient (AdamW)."""
    eps: Positive = 1e-8
    """Added to the root of the running square (AdamW)."""
    weight_decay: NonNegative = 0.1
    """Decoupled: a step shrinks the weights by lr x weight_decay."""
    momentum: Beta = 0.95
    """Of Muon's running gradient."""
    clip: NonNegative = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


class ScheduleConfig(Strict):
    """Learning rate over the run, as a factor of the peak. Every kind starts with a linear warm-up."""

    kind: Literal["wsd", "cosine", "linear", "constant"] = "cosine"
    """wsd: warm-up, stable, linear decay over the last `decay` of the run (arXiv 2405.18392)."""
    warmup: Fraction | Annotated[int, NUMBER, Field(ge=2)] = 0.02
    """Steps (2 or more) or a fraction of the run (0 to 1)."""
    decay: Annotated[float, NUMBER, Field(gt=0, le=1)] = 0.2
    """Fraction of the run that wsd decays over."""
    final: Fraction = 0.1
    """Learning rate at the end, as a fraction of the peak."""

    @field_validator("warmup", mode="before")
    @classmethod
    def _not_one(cls, value: Any) -> Any:
        if value == 1 and not isinstance(value, float):
            raise ValueError("is ambiguous: write 1.0 for the whole run, 0 for none, or 2 or more steps")
        return value


class BatchConfig(Strict):
    """The global batch of one optimizer step, over all devices. Micro-batch and accumulation are derived from it."""

    tokens: Count | None = None
    """Tokens per step."""
    sequences: Count | None = None
    """Rows of data.seq_len per step."""
    micro: Literal["auto"] | Count = "auto"
    """Rows of data.seq_len in one forward pass on one device; shorter rows of a curriculum fit more at the same tokens."""

    @model_validator(mode="after")
    def _check(self) -> BatchConfig:
        exactly_one(self, "tokens", "sequences")
        return self


class SpikeConfig(Strict):
    """Steps that are not applied: non-finite loss or gradient, or far above the recent ones (loss or gradient norm)."""

    sigma: NonNegative = 6.0
    """How many standard deviations above the mean of the window is a spike; 0 switches the test off."""
    window: Annotated[Count, Field(ge=8)] = 128
    """Steps in the window; the test starts when it is half full."""
    max_consecutive: Count = 20
    """Stop the run after this many skipped steps in a row."""


class TrainConfig(Strict):
    """Length of the run: exactly one of steps, tokens, epochs."""

    steps: Count | None = None
    """Optimizer steps."""
    tokens: Count | None = None
    """Tokens to train on; the last step is a whole one."""
    epochs: Positive | None = None
    """Passes over the training part of all sources, of each where none has a weight. With weights the tokens of so many
    passes over all of them together are shared by weight, and the facts of the run say how often each is seen."""
    spike: SpikeConfig = SpikeConfig()

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        exactly_one(self, "steps", "tokens", "epochs")
        return self
