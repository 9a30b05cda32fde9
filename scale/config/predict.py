"""Predictive training: what may be foreseen instead of computed, and how it is kept honest."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from scale.config.base import NUMBER, Count, Fraction, Positive, Strict

DirectionName = Literal["optimizer", "masked_slope"]
PRESETS: dict[str, dict[str, Any]] = {
    "conservative": {"warmup": 200, "min_full": 30, "horizons": (5, 25), "confidence": 0.9, "members": 5, "sigma": 2.2},
    "balanced": {"warmup": 100, "min_full": 20, "horizons": (10, 40), "confidence": 0.85, "members": 5, "sigma": 2.5},
    "aggressive": {"warmup": 50, "min_full": 15, "horizons": (20, 80), "confidence": 0.75, "members": 3, "sigma": 3.5},
}
"""What a preset says where the config is silent."""


class WorldConfig(Strict):
    """The world model of the run: an ensemble of recurrent state-space models, trained while the run goes on."""

    members: Annotated[int, NUMBER, Field(ge=1, le=16)] = 5
    """Models in the ensemble; their disagreement is part of the uncertainty."""
    hidden: Annotated[int, NUMBER, Field(ge=4, le=256)] = 32
    """Deterministic state (GRU units) of a member."""
    latent: Annotated[int, NUMBER, Field(ge=2, le=64)] = 8
    """Stochastic state of a member."""
    replay: Annotated[Count, Field(ge=64)] = 2048
    """Moments of training kept to learn from."""
    bptt: Annotated[int, NUMBER, Field(ge=3, le=128)] = 16
    """Moments in a training window (truncated back-propagation through time)."""
    train_every: Count = 10
    """Observed moments between two updates of the world model."""
    paths: Annotated[int, NUMBER, Field(ge=1, le=256)] = 16
    """Sampled futures of each member."""
    device: Literal["cpu", "training"] = "cpu"
    """Where the world model of rank 0 lives. training: on the device of the run; on CUDA the futures of a forecast are one
    Triton launch."""

    @model_validator(mode="after")
    def _check(self) -> WorldConfig:
        if self.replay < 2 * self.bptt:
            raise ValueError(f"world.replay = {self.replay}: holds no two windows of world.bptt = {self.bptt} moments")
        return self


class GuardConfig(Strict):
    """What is checked before a jump counts."""

    tokens: Annotated[int, NUMBER, Field(ge=0)] = 0
    """Tokens of the fixed check batches, drawn from the training data once and held back in that pass over them. 0: one step's
    batch."""
    correction_interval: Count = 15
    """Predicted steps between two checking forwards, at which a jump is shrunk, stopped or rolled back."""
    growth: Annotated[float, NUMBER, Field(ge=1, le=4)] = 1.0
    """Factor by which the interval grows after each part of a jump that lowered the check loss."""
    tolerance: Annotated[float, NUMBER, Field(ge=0, le=0.5)] = 0.0
    """Rise of the check loss, as a share of it, that a part of a jump may bring at first: noise in steep directions hides good
    jumps until a few full steps have settled them."""
    settle_steps: Annotated[int, NUMBER, Field(ge=1)] = 5
    """Full steps between a jump and its acceptance test: right after it, the loss misleads in both directions."""
    discount: Annotated[float, NUMBER, Field(gt=0, le=1)] = 0.8
    """Share of the steps that a jump is estimated to have saved by which the step counter advances; in mode always, of its
    length."""
    drift: Positive = 0.1
    """Largest change of the weights in one jump, relative to their norm."""


class SelectionConfig(Strict):
    """Which documents deserve a backward pass. Selection comes before packing; held-out loss on all sources judges it."""

    kind: Literal["off", "history", "regression"] = "off"
    """history: the highest remembered loss first, of a piece or of its neighbours in the document; what was never heard of
    before all. regression: as a ridge regression over all losses forecasts it today."""
    keep: Annotated[float, NUMBER, Field(ge=0.01, le=1)] = 0.5
    """Share of the candidates that is trained on."""
    warmup: Annotated[int, NUMBER, Field(ge=0)] = 100
    """Batches on all documents before any is left out, which begins with the next window of rows (256, or one batch's): what is
    hard for a model that knows nothing yet says little of what will teach it."""
    unbiased: bool = False
    """Draw in proportion to the score and weight losses by the inverse probability, instead of taking the best."""
    memory: Annotated[float, NUMBER, Field(ge=0, lt=1)] = 0.7
    """Weight of a document's earlier losses against its newest."""
    probe: Fraction = 0.0
    """Largest share of the candidates that are scored by a forward pass because the regression is unsure of them. Needs
    data.workers = 0."""

    @model_validator(mode="after")
    def _check(self) -> SelectionConfig:
        if self.unbiased and self.kind == "off":
            raise ValueError(
                "selection.unbiased = true: needs selection.kind = 'history' or 'regression' (it is 'off')"
            )
        if self.probe and self.kind != "regression":
            raise ValueError(
                f"selection.probe = {self.probe}: only selection.kind = 'regression' knows what it is unsure of"
            )
        return self


class PredictConfig(Strict):
    """Skip backward passes that the run's world model foresees. Every jump is checked on data that were held back."""

    enabled: bool = False
    """Off: bit-identical to a run without this section."""
    mode: Literal["auto", "always", "observe"] = "auto"
    """auto: jump where acceptance tests showed steps saved; full steps otherwise. always: jump as soon as rules and guard
    allow. observe: learn and forecast, never move a weight."""
    preset: Literal["conservative", "balanced", "aggressive"] = "balanced"
    """Values of warmup, min_full, horizons, confidence, world.members and sigma where they are not given."""
    warmup: Count = 100
    """Full steps before the first jump."""
    min_full: Count = 20
    """Full steps between two jumps."""
    horizons: Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)] = (10, 40)
    """Lengths of jumps to choose from, in steps. Not read with extrapolation_steps."""
    directions: Annotated[tuple[DirectionName, ...], Field(min_length=1, max_length=2)] = ("optimizer", "masked_slope")
    """Where to jump: what the choice is from. optimizer: along the last update; masked_slope: along the line of each weight
    that moves along one. Each keeps fp32 copies of the weights, which the table of facts counts."""
    coefficients: Literal["world", "line"] = "world"
    """How far along a direction: as the world model learned from how far past updates carried, or `share` of the straight
    line."""
    share: Positive = 1.0
    """Of the straight line; read with coefficients = line."""
    extrapolation_steps: Annotated[int, NUMBER, Field(ge=0)] = 0
    """Update extrapolation: so many full steps in a row are each repeated `extrapolation_ratio` times along their own update,
    then one acceptance test judges all of them. 0: single jumps. Needs directions = [optimizer], coefficients = line and
    every = 1."""
    extrapolation_ratio: Count = 3
    """How many times the update of a full step is repeated."""
    confidence: Fraction = 0.85
    """Least calibrated confidence of the world model for a jump."""
    sigma: Positive = 2.5
    """Loss this many standard deviations above its average counts as divergence: no jump for a while."""
    every: Count = 1
    """Steps between two statistics of weights and gradients (each reads every weight a few times)."""
    world: WorldConfig = WorldConfig()
    guard: GuardConfig = GuardConfig()
    selection: SelectionConfig = SelectionConfig()
    seed: Annotated[int, NUMBER, Field(ge=0, lt=2**31)] = 0
    """Of the world model and its sampled futures, and of rounding where weights are kept in bf16."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """The preset's values where nothing else is said."""
        preset = PRESETS.get(given.get("preset", "balanced")) if isinstance(given, dict) else None
        if preset is None:
            return given
        world = given.get("world")
        filled = {key: value for key, value in preset.items() if key != "members"} | given
        if world is None or isinstance(world, dict):
            filled["world"] = {"members": preset["members"]} | (world or {})
        return filled

    @model_validator(mode="after")
    def _check(self) -> PredictConfig:
        if len(set(self.horizons)) < len(self.horizons) or len(set(self.directions)) < len(self.directions):
            raise ValueError(
                f"horizons = {list(self.horizons)}, directions = {list(self.directions)}: name each one once"
            )
        if self.share != 1 and self.coefficients != "line":
            raise ValueError(
                f"share = {self.share:g}: read with coefficients = 'line' only (it is {self.coefficients!r})"
            )
        if self.extrapolation_steps:
            given = {"directions": list(self.directions), "coefficients": self.coefficients, "every": self.every}
            needed = {"directions": ["optimizer"], "coefficients": "line", "every": 1}
            wrong = [f"{key} = {needed[key]!r} (it is {is_!r})" for key, is_ in given.items() if is_ != needed[key]]
            wrong += [f"share = 1 (it is {self.share:g})"] if self.share != 1 else []
            if wrong:
                raise ValueError(
                    f"extrapolation_steps = {self.extrapolation_steps}: repeats the update just made: needs {', '.join(wrong)}"
                )
        if self.selection.kind != "off" and not self.enabled:
            raise ValueError(
                f"selection.kind = {self.selection.kind!r}: needs enabled = true (mode = 'observe': no jumps)"
            )
        return self

    @property
    def arms(self) -> list[tuple[int, str]]:
        """(steps, direction) of the jumps to choose from; the ratio and the direction of update extrapolation."""
        if self.extrapolation_steps:
            return [(self.extrapolation_ratio, "optimizer")]
        return [(horizon, name) for name in self.directions for horizon in self.horizons]
