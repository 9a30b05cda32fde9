"""What prediction keeps on each device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from scale.config.predict import DirectionName
from scale.errors import UsageError
from scale.predict.weights.directions.table import DIRECTIONS

GIB = 2**30
_FP32 = 4
ON_CPU = "jump, in CPU memory"


def footprint(
    numel: int, directions: Sequence[DirectionName], offload: bool, use: Literal["adopt", "shadow"] = "adopt"
) -> dict[str, int]:
    """Bytes by purpose for `numel` elements of local shards.

    Looks keep the weights as last seen and their drift, a reading of `Carry` two more; a jump keeps where it began and
    where it led, or in place of the latter the best predicted weights, which lie beside the masters; `working` is what comes
    and goes at a look or jump.
    """
    copies = {"looks": 2, "carry": 2} | {name: DIRECTIONS[name].copies for name in directions}
    jump = {"snapshot": 1} | ({"landing": 1} if use == "adopt" else {})
    copies |= {ON_CPU: sum(jump.values())} if offload else jump
    copies |= {"shadow": 1} if use == "shadow" else {}
    copies |= {"working": 1}
    return {what: _FP32 * numel * count for what, count in copies.items()}


def on_device(parts: Mapping[str, int]) -> int:
    """Bytes of a footprint that are not in CPU memory by choice."""
    return sum(size for what, size in parts.items() if what != ON_CPU)


def check_budget(limit_gib: float | None, parts: Mapping[str, int]) -> None:
    """Raises UsageError if a footprint needs more than the limit on a device. None: no limit."""
    if limit_gib is None or on_device(parts) <= limit_gib * GIB:
        return
    shown = ", ".join(f"{what} {size / GIB:.3g}" for what, size in parts.items() if size and what != ON_CPU)
    snapshot = ", set predict.guard.offload=true" if ON_CPU not in parts else ""
    raise UsageError(
        f"predict.guard.memory = {limit_gib:g}: prediction needs {on_device(parts) / GIB:.3g} GiB on each device ({shown}): "
        f"raise it{snapshot} or name fewer predict.directions"
    )
