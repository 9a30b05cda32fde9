import json

import numpy as np
import pytest

from scale.predict.selection.history import LossHistory, Passages
from tests.predict.selection.parts import alone


def test_remembered_losses_by_hand():
    history = LossHistory(alone(3, 2), memory=0.7)
    history.update(4, np.array([0, 3]), np.array([2.0, 6.0]))
    history.update(9, np.array([0]), np.array([1.0]))
    assert history.loss_P == pytest.approx([0.7 * 2 + 0.3 * 1, np.nan, np.nan, 6.0, np.nan], nan_ok=True)
    assert history.group_P.tolist() == [9, -1, -1, 4, -1] and history.visits_P.tolist() == [2, 0, 0, 1, 0]
    assert history.level == pytest.approx(0.8 * 4 + 0.2 * 1)
    assert history.trend == pytest.approx(0.8 * 4 + 0.2 * 1 - (0.95 * 4 + 0.05 * 1))
    assert history.source_S == pytest.approx([0.8 * 2 + 0.2 * 1, 6.0])
    assert history.level_P[[0, 3]] == pytest.approx([0.7 * 4 + 0.3 * 3.4, 4.0])


def test_passages_are_neighbouring_pieces_of_one_document():
    """Three documents of 40, 0 and 3 pieces, and one of 20 in a second source."""
    made = Passages([np.array([40, 40, 43]), np.array([20])])
    expected = [0] * 16 + [1] * 16 + [2] * 8 + [3] * 3 + [4] * 16 + [5] * 4
    assert made.of(np.arange(63)).tolist() == expected and made.count == 6
    assert made.source_of(np.arange(63)).tolist() == [0] * 43 + [1] * 20
    shuffled = np.random.default_rng(0).permutation(63)
    assert made.of(shuffled).tolist() == [expected[i] for i in shuffled]


def test_passages_are_remembered_by_hand():
    history = LossHistory(Passages([np.array([20])]), memory=0.7)
    history.update(0, np.array([1, 3, 17]), np.array([2.0, 4.0, 9.0]))
    assert history.loss_Q == pytest.approx([3.0, 9.0]) and history.level == 5.0
    assert history.extra_Q == pytest.approx([3 - 5, 9 - 5]) and history.visits_Q.tolist() == [2, 1]
    history.update(1, np.array([2]), np.array([6.0]))
    level = 0.8 * 5 + 0.2 * 6
    assert history.loss_Q == pytest.approx([0.7 * 3 + 0.3 * 6, 9.0]) and history.visits_Q.tolist() == [3, 1]
    assert history.extra_Q == pytest.approx([(2 * (3 - 5) + (6 - level)) / 3, 4.0])


def test_visits_do_not_run_over():
    history = LossHistory(alone(1), 0.5)
    history.visits_P[0] = 65535
    history.update(0, np.array([0]), np.array([1.0]))
    assert history.visits_P[0] == 65535


def test_state_comes_back_bit_for_bit_and_holds_only_what_was_seen():
    rng = np.random.default_rng(0)
    history, other = (LossHistory(Passages([np.array([20, 900]), np.array([101])]), 0.7) for _ in range(2))
    other.update(0, np.arange(50), np.ones(50))  # is overwritten
    for group in range(12):
        pieces = rng.choice(1001, 20, replace=False)
        history.update(group, pieces, rng.exponential(3.0, 20))
    text = json.dumps(history.state_dict())
    other.load_state_dict(json.loads(text))
    assert json.dumps(other.state_dict()) == text
    for name in ("loss_P", "level_P", "group_P", "visits_P", "source_S", "loss_Q", "extra_Q", "visits_Q"):
        assert getattr(history, name).tobytes() == getattr(other, name).tobytes()
    fresh = len(json.dumps(LossHistory(alone(100_000), 0.7).state_dict()))
    assert fresh < 2 * 100_000 / 8 * 4 / 3 + 900  # a bit for each piece and for each passage
