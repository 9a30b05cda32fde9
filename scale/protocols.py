"""The five parts of a run and what passes between them. Read this file first.

    Source --Group--> Stepper --Loss--> Strategy --Update--> Stepper --StepReport--> loop, Source, monitors
                         Objective (pure) is called inside the forward of the wrapped root
                         Judge scores the model on data that is never trained on

Shape letters: B rows, L tokens per row, V vocabulary, D model width, S segments (packed documents) per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Size, Tensor, nn

    from scale.config.optim import OptimConfig
    from scale.parallel.ranks import Ranks

Batch = Mapping[str, "Tensor"]
"""One micro-batch: named tensors that all share their first dimension, so that any batch can be halved."""


@dataclass
class Group:
    """All micro-batches of one optimizer step, on this rank.

    `tokens` counts the whole step over all ranks, padding left out. `seq_len` and `sources` (tokens drawn from each
    data source so far) describe the draw; generic sources leave them out.
    """

    batches: list[Batch]
    tokens: int
    seq_len: int | None = None
    sources: dict[str, int] = field(default_factory=dict)
    hear: Callable[[Sequence[Tensor]], None] | None = None
    """Where it is given, the stepper calls it after the step, on every rank, with `Loss.per_segment` of each micro-batch
    in order: for selection."""

    def split(self, parts: int) -> list[Batch]:
        """The same rows in the same order as micro-batches `parts` times smaller (at least one row each)."""
        if parts == 1:
            return self.batches
        out: list[Batch] = []
        for batch in self.batches:
            rows = len(next(iter(batch.values())))
            size = max(1, -(-rows // parts))
            out += [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, rows, size)]
        return out


@dataclass
class Term:
    """A SUM over this micro-batch together with its own denominator (tokens, pairs, router entries), never a mean."""

    total: Tensor
    count: Tensor
    weight: float = 1.0


@dataclass
class Loss:
    """What an objective returns. A metric that counts nothing has no value. `per_segment` holds summed losses of packed
    documents, shape (B, S), on request."""

    terms: dict[str, Term]
    metrics: dict[str, Term] = field(default_factory=dict)
    per_segment: Tensor | None = None


class Objective(Protocol):
    """A pure function of (model, batch): no I/O, no distributed calls, no normalisation. Ranks and micro-batches may name
    other terms and metrics, in any order: those of one name are added up."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Denominator of every term in this micro-batch, known before the forward pass: what `Term.count` will be. Where
        the two differ over all micro-batches and ranks the run ends."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> Loss: ...


@dataclass
class Shard:
    """This rank's part of one fp32 master parameter: rows from `offset` of a parameter of `global_shape`.

    `flat` says that the part is a run of the flattened parameter starting at element `offset` (ZeRO cuts rows). A rank
    without a part has an empty one, so that every rank knows all names. `copies` ranks hold the same part.
    """

    name: str
    param: Tensor
    grad: Tensor | None
    global_shape: tuple[int, ...]
    offset: int = 0
    flat: bool = False
    copies: int = 1


Shards = dict[str, Shard]
Observe = Callable[[Shards], None]
"""Called with parameters and gradients after clipping, before the optimizer moves anything."""
Veto = Callable[[float], str | None]
"""Given the global gradient norm before clipping: a reason not to apply this step, or None."""
Weights = Callable[[str, "Size"], "Tensor"]
"""The full fp32 value of one parameter by name and shape; called once per parameter, so nothing sits whole in memory."""


@dataclass
class Update:
    """What `Strategy.update` did. `grad_norm` is the global norm before clipping."""

    grad_norm: float
    skipped: str | None = None


class Strategy(Protocol):
    """Where weights live and how gradients meet. With `Ranks`, all that knows DTensor, ZeRO or a process group."""

    @property
    def ranks(self) -> Ranks: ...

    def prepare(self, root: nn.Module, optim: OptimConfig | None, weights: Weights | None) -> nn.Module:
        """Place, fill and wrap the root; build the optimizer. `optim=None` makes a frozen reference."""
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Context of one forward+backward; gradients are exchanged only in the last one of a step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Backward of an already globally normalised loss; undoes the averaging that the backend does by itself."""
        ...

    def update(self, lr_factor: float, max_norm: float, observe: Observe | None, veto: Veto | None) -> Update:
        """Clip, apply (unless vetoed) at peak lr x `lr_factor`, and drop the gradients."""
        ...

    def discard(self) -> None:
        """Drop the gradients gathered so far."""
        ...

    def edit_masters(self) -> AbstractContextManager[Shards]:
        """Local fp32 masters, writable; on exit what was written is published to the weights of the next forward."""
        ...

    def full_params(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, one at a time: export, weight sync to rollout engines."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Canonical state: `model/NAME` and `optim/NAME/MOMENT`, fp32, per parameter, whatever the strategy.

        Over all ranks every name is there, of its global shape: as a DTensor, whole on every rank, or whole on one only.
        """
        ...

    def blank(self, saved: Mapping[str, Size]) -> dict[str, Tensor]:
        """Tensors into which this rank reads its part of a canonical state of these names and global shapes (DTensors, or
        some of the names whole). Raises ScaleError if they do not fit the model."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what was read into `blank`. Collective."""
        ...


StepKind = Literal["full", "predict", "correct", "skipped"]


@dataclass
class StepReport:
    """One step as it happened. `loss` is the globally normalised training loss; predicted losses never go here."""

    step: int
    kind: StepKind
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    forward_passes: int
    backward_passes: int
    forward_tokens: int
    backward_tokens: int
    seconds: float
    seq_len: int | None = None
    skipped: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    layer_gradients: dict[str, float] = field(default_factory=dict)
    prediction: dict[str, Any] = field(default_factory=dict)
    """What was foreseen and what came of it, and the ledger: never mixed with what was measured in training."""


@runtime_checkable
class Stateful(Protocol):
    """Resume restores every stateful part or fails. States are JSON: numbers, strings, lists, dicts."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Source(Stateful, Protocol):
    """An endless, resumable stream of groups. GRPO is a source as well: its groups come from rollouts."""

    def draw(self) -> Group:
        """The micro-batches of one optimizer step."""
        ...

    def rehearse(self) -> Group | None:
        """One micro-batch of every shape to come, taken without advancing the stream (None: skip the dry run)."""
        ...

    def observe(self, report: StepReport) -> None:
        """Hear how the step went: curriculum, selection, staleness."""
        ...

    def publish(self, version: int, params: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Called by the loop after every step, real or predicted, and before the first one of a resumed run, with a way to
        read the weights as they are then (`version`: steps made): for rollout engines; nothing elsewhere. Weights that jump
        before a draw are published once more, under the same version. Reading is collective."""
        ...


class Stepper(Stateful, Protocol):
    """Decides how the weights move: by a real backward pass or by a predicted delta."""

    def rehearse(self, source: Source) -> None:
        """Meet every shape to come without a step and without leaving a trace."""
        ...

    def step(self, source: Source) -> StepReport: ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the stepper beside its JSON state, named `predict/...`, as `Strategy.tensors`."""
        ...

    def blank(self, saved: Mapping[str, Size]) -> dict[str, Tensor]:
        """Tensors into which this rank reads its part of what `tensors` gave, as `Strategy.blank`."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what was read into `blank`. Collective."""
        ...


@dataclass
class Score:
    """Held-out result: mean loss per token, by data source, over `tokens` scored tokens. NaN where nothing was scored; then a
    data source is left out."""

    loss: float
    tokens: int
    by_source: dict[str, float] = field(default_factory=dict)


class Judge(Protocol):
    """Is the model better? Held-out loss, or short rollouts in RL."""

    def score(self) -> Score: ...


class Monitor(Protocol):
    """Something that watches: progress bar, tracker. The loop survives its failures."""

    name: str

    def start(self, facts: Mapping[str, Any]) -> None: ...

    def log(self, row: Mapping[str, Any]) -> None: ...

    def finish(self, status: str) -> None: ...
