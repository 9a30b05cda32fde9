import json

import numpy as np
import pytest

from scale.predict.selection.foresight import FEATURES, Foreseen, Remembered
from scale.predict.selection.history import Passages
from tests.predict.selection.parts import alone


def world(group, pieces, rng):
    """A piece's loss: as hard as its number, halved in 60 groups, faster for the second source."""
    return (1 + pieces % 7) * 0.5 ** (group / np.where(pieces < 150, 60, 30)) + rng.normal(0, 0.02, len(pieces))


def lived(groups=120, seed=0):
    rng = np.random.default_rng(seed)
    foreseen, remembered, errors = Foreseen(alone(150, 50), 0.7), Remembered(alone(150, 50), 0.7), []
    for group in range(groups):
        pieces = rng.choice(200, 24, replace=False)
        losses = world(group, pieces, rng)
        if group > 40:
            expected, unsure = foreseen.scores(group, pieces)
            errors.append((losses - expected, losses - remembered.scores(group, pieces)[0], unsure))
        foreseen.learn(group, pieces, losses)
        remembered.learn(group, pieces, losses)
    return foreseen, [np.concatenate(column) for column in zip(*errors, strict=True)]


def test_unseen_pieces_come_first_then_the_highest_remembered_loss():
    made = Remembered(alone(4), 0.7)
    made.learn(0, np.array([0, 2]), np.array([1.0, 3.0]))
    assert made.scores(5, np.arange(4))[0].tolist() == [1.0, np.inf, 3.0, np.inf]


@pytest.mark.parametrize("make", [Remembered, Foreseen])
def test_pieces_that_were_not_seen_are_known_by_their_neighbours(make):
    """Eight documents of 16 pieces, each with a difficulty of its own; half of the pieces are heard of."""
    rng, made = np.random.default_rng(3), make(Passages([np.arange(16, 129, 16)]), 0.7)
    hard_D = rng.permutation(8)
    for group in range(40):
        pieces = rng.choice(np.flatnonzero(np.arange(128) % 2 == 0), 16, replace=False)
        made.learn(group, pieces, 3 + hard_D[pieces // 16] + rng.normal(0, 0.5, 16))
    unseen = np.flatnonzero(np.arange(128) % 2 == 1)
    expected, _ = made.scores(40, unseen)
    assert np.corrcoef(expected, hard_D[unseen // 16])[0, 1] > 0.95
    assert np.abs(expected - 3 - hard_D[unseen // 16]).mean() < 0.6


def test_the_regression_foresees_falling_losses_better_than_memory():
    _, (ours, memory, unsure) = lived()
    seen = np.isfinite(memory)
    assert np.sqrt((ours[seen] ** 2).mean()) < 0.5 * np.sqrt((memory[seen] ** 2).mean())
    assert 0.5 < np.sqrt(((ours / unsure) ** 2).mean()) < 1.5  # the uncertainty is of the size of the errors


def test_weights_are_those_of_ridge_regression_in_closed_form():
    """The last update alone, against least squares on rows scaled by the weight of their group."""
    rng = np.random.default_rng(1)
    made, rows, targets = Foreseen(alone(40), 0.7), [], []
    for group in range(30):
        pieces = rng.choice(40, 8, replace=False)
        losses = rng.exponential(2.0, 8)
        if group:
            base, features = made._features(group, pieces)
            rows, targets = [r * 0.99**0.5 for r in rows], [t * 0.99**0.5 for t in targets]
            rows.append(features), targets.append(losses - base)
        made.learn(group, pieces, losses)
    x, y = np.concatenate([*rows, np.eye(FEATURES)]), np.concatenate([*targets, np.zeros(FEATURES)])
    assert made._weights() == pytest.approx(np.linalg.lstsq(x, y, rcond=None)[0], rel=1e-6, abs=1e-9)


def test_what_was_never_seen_is_less_certain():
    made, _ = lived(10)
    unseen, seen = (np.flatnonzero(made.history.visits_P == n)[:5] for n in (0, 2))
    assert made.scores(10, unseen)[1].min() > made.scores(10, seen)[1].max()


def test_before_anything_was_heard_all_are_alike():
    expected, unsure = Foreseen(alone(5), 0.7).scores(0, np.arange(5))
    assert expected.tolist() == [0.0] * 5 and len(set(unsure)) == 1


def test_state_comes_back_bit_for_bit():
    made, _ = lived(50)
    other = Foreseen(alone(150, 50), 0.7)
    text = json.dumps(made.state_dict())
    other.load_state_dict(json.loads(text))
    pieces = np.arange(200)
    assert json.dumps(other.state_dict()) == text
    for a, b in zip(made.scores(60, pieces), other.scores(60, pieces), strict=True):
        assert a.tobytes() == b.tobytes()
