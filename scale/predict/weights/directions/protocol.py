"""What a direction is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from scale.parallel.ranks import Ranks
from scale.protocols import Shards


class Direction(Protocol):
    """Foresees where the weights go from looks at them. Lists hold one tensor per local shard, in the shards' order.

    Memory is taken when it is made and never grows. Time is counted in steps x lr factor, so that a schedule does not
    look like a change of heart.
    """

    name: str
    copies: int
    """fp32 copies of the local shards that are kept, beside those of `Looks`."""

    def __init__(self, shards: Shards, ranks: Ranks) -> None:
        """Raises UsageError for shards it cannot work with."""

    def observe(self, params: Sequence[Tensor], update: Sequence[Tensor] | None, steps: int, lr: float) -> None:
        """A look. `steps` and the sum `lr` > 0 of their lr factors lie since the last one; `update` is what the weights
        moved since then, divided by `lr`. None where there was no last look: at first and after `restart`, with 0 and 0.
        Neither list may be written or kept."""
        ...

    def restart(self) -> None:
        """The weights were moved by something that was not training: the next look has no predecessor."""
        ...

    def vectors(self) -> Sequence[Tensor] | None:
        """Displacement per step at lr factor 1, not to be written; None while too little was seen. Collective."""
        ...

    def tensors(self) -> dict[str, Sequence[Tensor]]:
        """All that is kept in the shape of shards: checkpoints save it and read it back in place."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
