"""What prediction keeps on each device."""

from __future__ import annotations

from collections.abc import Sequence

from scale.config.predict import DirectionName
from scale.predict.weights.directions import DIRECTIONS

_FP32 = 4


def footprint(numel: int, directions: Sequence[DirectionName]) -> dict[str, int]:
    """Bytes by purpose for `numel` elements of local shards.

    Statistics keep the weights as last seen and the smoothed update, `Carry` two more; a jump keeps where it began and where
    it led; `working` is what comes and goes at statistics or a jump.
    """
    copies = {"statistics": 2, "carry": 2} | {name: DIRECTIONS[name].copies for name in directions}
    copies |= {"snapshot": 1, "landing": 1, "working": 1}
    return {purpose: _FP32 * numel * count for purpose, count in copies.items()}
