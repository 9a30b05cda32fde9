"""What ranks do in `test_ranks.py`."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from scale.parallel.ranks import Ranks
from tests.predict.selection.parts import DOCUMENTS, selecting, step


def select(ranks: Ranks, workers: int, count: int, config: dict[str, Any]) -> dict[str, Any]:
    """Rows of each step as this rank got them, and the state at the end."""
    source = selecting(workers, ranks, **config)
    rows = []
    for number in range(count):
        group = step(source, number)
        rows.append([row.tolist() for batch in group.batches for row in batch["input_ids"]])
    return {"rows": rows, "state": sha256(json.dumps(source.state_dict()).encode()).hexdigest()}


def probe(ranks: Ranks) -> list[float | None]:
    """Losses of some documents by a small model."""
    from tests.predict.selection.training import probe_of

    spans, found, _ = probe_of(ranks, DOCUMENTS)
    assert len(spans) == len(found.losses_N)
    return [None if loss != loss else loss for loss in found.losses_N.tolist()]
