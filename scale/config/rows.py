"""How the rows of a step are dealt out to ranks."""

from __future__ import annotations

from scale.config.run import PretrainRun
from scale.errors import UsageError


def check_rows(config: PretrainRun, world_size: int) -> None:
    """The rows of a step are dealt out evenly. Raises UsageError."""
    rows, micro = config.rows_per_step, config.batch.micro
    unit = "batch.tokens" if config.batch.tokens is not None else "batch.sequences"
    size = config.data.seq_len if config.batch.tokens is not None else 1
    if rows % world_size:
        near = sorted({max(1, rows // world_size) * world_size * size, -(-rows // world_size) * world_size * size})
        raise UsageError(
            f"{unit} = {rows * size}: the {rows} rows of a step do not divide among {world_size} ranks "
            f"(use {unit}={' or '.join(str(n) for n in near)}, or another number of ranks)"
        )
    if isinstance(micro, int) and (rows // world_size) % micro:
        raise UsageError(
            f"batch.micro = {micro}: does not divide the {rows // world_size} rows that each of {world_size} ranks gets"
        )
