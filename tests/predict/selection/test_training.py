"""Does it help? A corpus half of which has nothing to teach after a few steps."""

import numpy as np
import pytest

from tests.predict.selection.training import run

STEPS = 160


@pytest.mark.parametrize("seed", [0, 1])
def test_history_reaches_the_plain_held_out_loss_in_fewer_steps(seed):
    """Held-out loss is over both halves. Seen: 130 to 135 steps for 160 plain ones, over three seeds."""
    (plain,), _ = run(STEPS, STEPS, seed, 3e-3, kind="off")
    losses, source = run(140, 5, seed, 3e-3, kind="history")
    assert min(losses) < plain
    counts = source.passed_over()["all"]
    assert counts["tokens"] == 32 * counts["documents"] > 0


def test_the_foreseen_losses_separate_what_is_known_from_what_is_not():
    _, source = run(100, 100, 0, 3e-3, kind="regression", probe=0.1)
    selector = source.planner.selector
    pieces = np.flatnonzero(selector.saved.foresight.history.visits_P)
    spans = {int(source.planner.pieces([s])[0]): s for s in (source.planner.orders[0].span(0, i) for i in range(512))}
    expected, _ = selector.saved.foresight.scores(100, pieces)
    known = [loss for piece, loss in zip(pieces, expected, strict=True) if spans[piece].doc % 2]
    learnable = [loss for piece, loss in zip(pieces, expected, strict=True) if not spans[piece].doc % 2]
    right = np.mean([[easy < hard for easy in known] for hard in learnable])
    assert right > 0.95
    assert selector.probed["documents"] > 0 and selector.probed["forwards"] > 0
