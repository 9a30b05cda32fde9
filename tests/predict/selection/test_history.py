import json

import numpy as np
import pytest

from scale.predict.selection.history import LossHistory


def test_remembered_losses_by_hand():
    history = LossHistory([3, 2], memory=0.7)
    history.update(4, np.array([0, 3]), np.array([2.0, 6.0]))
    history.update(9, np.array([0]), np.array([1.0]))
    assert history.loss_P == pytest.approx([0.7 * 2 + 0.3 * 1, np.nan, np.nan, 6.0, np.nan], nan_ok=True)
    assert history.group_P.tolist() == [9, -1, -1, 4, -1] and history.visits_P.tolist() == [2, 0, 0, 1, 0]
    assert history.level == pytest.approx(0.8 * 4 + 0.2 * 1)
    assert history.trend == pytest.approx(0.8 * 4 + 0.2 * 1 - (0.95 * 4 + 0.05 * 1))
    assert history.source_S == pytest.approx([0.8 * 2 + 0.2 * 1, 6.0])
    assert history.level_P[[0, 3]] == pytest.approx([0.7 * 4 + 0.3 * 3.4, 4.0])


def test_visits_do_not_run_over():
    history = LossHistory([1], 0.5)
    history.visits_P[0] = 65535
    history.update(0, np.array([0]), np.array([1.0]))
    assert history.visits_P[0] == 65535


def test_state_comes_back_bit_for_bit_and_holds_only_what_was_seen():
    rng = np.random.default_rng(0)
    history, other = LossHistory([900, 101], 0.7), LossHistory([900, 101], 0.7)
    other.update(0, np.arange(50), np.ones(50))  # is overwritten
    for group in range(12):
        pieces = rng.choice(1001, 20, replace=False)
        history.update(group, pieces, rng.exponential(3.0, 20))
    text = json.dumps(history.state_dict())
    other.load_state_dict(json.loads(text))
    assert json.dumps(other.state_dict()) == text
    for name in ("loss_P", "level_P", "group_P", "visits_P", "source_S"):
        assert getattr(history, name).tobytes() == getattr(other, name).tobytes()
    fresh = len(json.dumps(LossHistory([100_000], 0.7).state_dict()))
    assert fresh < 100_000 / 8 * 4 / 3 + 600
