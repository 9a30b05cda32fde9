"""Length curriculum: short rows early in the run, at a constant number of tokens per step (SLW, arXiv 2108.06084)."""

from __future__ import annotations

from collections.abc import Callable

from scale.config.data import DataConfig


def seq_len_schedule(config: DataConfig, steps: int) -> Callable[[int], int]:
    """Row length of the n-th group drawn, n counted from 0, in a run of `steps` groups."""

    def seq_len_of(group: int) -> int:
        for lesson in config.curriculum:
            if group < lesson.until * steps:
                return lesson.seq_len
        return config.seq_len

    return seq_len_of
