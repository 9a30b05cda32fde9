"""Predictive training: what may be foreseen instead of computed, and how it is kept honest."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from scale.config.base import NUMBER, Count, Fraction, Positive, Strict

DirectionName = Literal["drift", "window", "optimizer", "singular", "masked_slope"]
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

    @model_validator(mode="after")
    def _check(self) -> WorldConfig:
        if self.replay < 2 * self.bptt:
            raise ValueError(f"world.replay = {self.replay}: holds no two windows of world.bptt = {self.bptt} moments")
        return self


class GuardConfig(Strict):
    """What is checked before a jump counts, and what it may cost in memory."""

    tokens: Annotated[int, NUMBER, Field(ge=0)] = 0
    """Tokens of the fixed check batches, drawn from the training data once and held back in that pass over them. 0: one step's
    batch."""
    correction_interval: Count = 15
    """Predicted steps between two checking forwards, at which a jump is shrunk, stopped or rolled back."""
    growth: Annotated[float, NUMBER, Field(ge=1, le=4)] = 1.0
    """Factor by which the interval grows after each part of a jump that lowered the check loss."""
    tolerance: Annotated[float, NUMBER, Field(ge=0, le=0.5)] = 0.0
    """Rise of the check loss, as a share of it, that a part of a jump may bring at first: noise in steep directions hides good
    jumps until a few full steps have relaxed them."""
    relax: Annotated[int, NUMBER, Field(ge=1)] = 5
    """Full steps after a jump before it is judged: right after it, the loss misleads in both directions."""
    credit: Annotated[float, NUMBER, Field(gt=0, le=1)] = 0.8
    """Share of a jump's measured worth, in full steps, by which the step counter advances; in mode always, of its length."""
    drift: Positive = 0.1
    """Largest change of the weights in one jump, relative to their norm."""
    offload: bool = False
    """Keep the snapshot of a jump in CPU memory."""
    memory: Positive | None = None
    """GiB that prediction may keep on each device (snapshots, directions); refused if it would need more."""


class SelectionConfig(Strict):
    """Which documents deserve a backward pass. Selection comes before packing; held-out loss on all sources judges it."""

    kind: Literal["off", "history", "world"] = "off"
    """history: the highest remembered loss first, of a piece or of its neighbours in the document; what was never heard of
    before all. world: as foreseen today."""
    keep: Annotated[float, NUMBER, Field(ge=0.01, le=1)] = 0.5
    """Share of the candidates that is trained on. With control = bandit: one of the shares to choose from."""
    warmup: Annotated[int, NUMBER, Field(ge=0)] = 100
    """Batches on all documents before any is left out, which begins with the next window of rows (256, or one batch's): what is
    hard for a model that knows nothing yet says little of what will teach it."""
    control: Literal["fixed", "bandit"] = "fixed"
    """fixed: `keep` throughout. bandit: all documents at first; then keep, shares or all of them, whichever lowers the check
    loss fastest, tried in episodes between episodes on all."""
    shares: Annotated[tuple[Annotated[float, NUMBER, Field(ge=0.01, lt=1)], ...], Field(max_length=4)] = ()
    """Further shares for the bandit to choose from."""
    episode: Annotated[Count, Field(ge=4)] = 48
    """Full steps by which the bandit judges a share; they begin when the first window of that share is reached."""
    unbiased: bool = False
    """Draw in proportion to the score and weight losses by the inverse probability, instead of taking the best."""
    memory: Annotated[float, NUMBER, Field(ge=0, lt=1)] = 0.7
    """Weight of a document's earlier losses against its newest."""
    probe: Fraction = 0.0
    """Largest share of the candidates that are scored by a forward pass because the world model is unsure of them. Needs
    data.workers = 0."""

    @model_validator(mode="after")
    def _check(self) -> SelectionConfig:
        if self.unbiased and self.kind == "off":
            raise ValueError("selection.unbiased = true: needs selection.kind = 'history' or 'world' (it is 'off')")
        if self.probe and self.kind != "world":
            raise ValueError(
                f"selection.probe = {self.probe}: only selection.kind = 'world' knows what it is unsure of"
            )
        if self.shares and self.control != "bandit":
            raise ValueError(f"selection.shares = {list(self.shares)}: needs selection.control = 'bandit'")
        if self.control == "bandit" and (self.kind == "off" or self.keep == 1):
            raise ValueError(
                f"selection.control = 'bandit': needs selection.kind = 'history' or 'world' (it is {self.kind!r}) and "
                f"selection.keep below 1 (it is {self.keep:g})"
            )
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(
                f"selection.keep = {self.keep:g}, selection.shares = {list(self.shares)}: name each share once"
            )
        return self

    @property
    def arms(self) -> tuple[float, ...]:
        """What the bandit chooses from, beside all documents."""
        return (self.keep, *self.shares)


class PredictConfig(Strict):
    """Skip backward passes that the run's world model foresees. Every jump is checked on data that were held back."""

    enabled: bool = False
    """Off: bit-identical to a run without this section."""
    mode: Literal["auto", "always", "observe"] = "auto"
    """auto: jump where it has paid, after relaxing, against full steps; stay in full steps otherwise. always: jump as soon
    as rules and guard allow. observe: learn and forecast, never move a weight."""
    use: Literal["adopt", "shadow"] = "adopt"
    """adopt: training goes on from the predicted weights. shadow: they are checked and the best are kept and exported
    while training goes on untouched."""
    stop_below: Positive | None = None
    """With use = shadow: end the run once the predicted weights that are kept have a check loss (nats per token) this low.
    Never if not given."""
    preset: Literal["conservative", "balanced", "aggressive"] = "balanced"
    """Values of warmup, min_full, horizons, confidence, world.members and sigma where they are not given."""
    warmup: Count = 100
    """Full steps before the first jump."""
    min_full: Count = 20
    """Full steps between two jumps."""
    horizons: Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)] = (10, 40)
    """Lengths of jumps to choose from, in steps."""
    directions: Annotated[tuple[DirectionName, ...], Field(min_length=1, max_length=5)] = ("drift", "masked_slope")
    """Where to jump: what the choice is from. Each keeps fp32 copies of the weights, which the table of facts counts."""
    strides: Annotated[int, NUMBER, Field(ge=0)] = 0
    """Full steps that are carried on one after the other, each by a horizon along its own update, before they are judged
    together: one verdict on a policy, where single jumps cannot be told from noise. 0: single jumps. Needs coefficients =
    last and every = 1."""
    coefficients: Literal["world", "line", "fixed", "last"] = "world"
    """How far along a direction: as the world model learned from how far past drift carried; as a straight line would; a
    fixed share of it; the last update repeated (a straight line along the direction optimizer, which it asks for)."""
    fixed: Positive | None = None
    """Share of the straight line; given with coefficients = fixed, and only then."""
    confidence: Fraction = 0.85
    """Least calibrated confidence of the world model for a jump."""
    sigma: Positive = 2.5
    """Loss this many standard deviations above its average counts as divergence: no jump for a while."""
    costs: Literal["flops", "measured"] = "flops"
    """What a forward pass costs beside a full step. flops: a third, token by token. measured: timed once, at the end of the
    warm-up, and kept in the checkpoint; two runs then decide differently."""
    every: Count = 1
    """Steps between two looks at the weights (a look reads every weight a few times)."""
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
        if self.use == "shadow" and self.mode == "observe":
            raise ValueError(
                "use = 'shadow' with mode = 'observe': nothing would ever be kept (mode = 'auto' or 'always')"
            )
        if self.coefficients == "last" and self.directions != ("optimizer",):
            raise ValueError(
                f"coefficients = 'last' with directions = {list(self.directions)}: the last update is the direction "
                "'optimizer'; name that one alone (or coefficients = 'line')"
            )
        if self.strides and (self.coefficients != "last" or self.every != 1 or self.use != "adopt"):
            wrong = {"coefficients = 'last'": self.coefficients, "every = 1": self.every, "use = 'adopt'": self.use}
            needed = [f"{need} (it is {is_!r})" for need, is_ in wrong.items() if not need.endswith(f"= {is_!r}")]
            raise ValueError(f"strides = {self.strides}: carry on the update just made: needs {', '.join(needed)}")
        if (self.fixed is not None) != (self.coefficients == "fixed"):
            raise ValueError(f"fixed = {self.fixed} with coefficients = {self.coefficients!r}: they belong together")
        if self.stop_below is not None and (self.use != "shadow" or self.mode == "observe"):
            raise ValueError(
                f"stop_below = {self.stop_below:g}: looks at the weights that use = 'shadow' keeps in mode 'auto' or "
                f"'always' (here use = {self.use!r}, mode = {self.mode!r})"
            )
        if self.selection.kind != "off" and not self.enabled:
            raise ValueError(
                f"selection.kind = {self.selection.kind!r}: needs enabled = true (mode = 'observe': no jumps)"
            )
        if self.selection.control == "bandit" and self.mode != "auto":
            raise ValueError(f"selection.control = 'bandit': needs mode = 'auto' (it is {self.mode!r})")
        return self
