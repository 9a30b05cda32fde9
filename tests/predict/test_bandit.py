"""The choice between jumps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scale.predict.bandit import STAY, Arm, Bandit

ARMS: list[Arm] = [(10, "optimizer"), (40, "optimizer"), (10, "masked_slope")]


def mean(bandit, context_D):
    """Expected reward of every arm, without optimism."""
    return np.linalg.solve(bandit.gram_KDD, bandit.moment_KD[..., None])[..., 0] @ np.asarray(context_D)


def test_expectation_and_choice_are_ridge_regression_by_hand() -> None:
    bandit = Bandit([(5, "optimizer")], 2)
    bandit.learn((5, "optimizer"), [1.0, 0.0], 0.5)
    bandit.learn((5, "optimizer"), [1.0, 2.0], -1.0)
    # A = I + [[2, 2], [2, 4]] = [[3, 2], [2, 5]], b = [-.5, -2], A^-1 = [[5, -2], [-2, 3]] / 11
    # theta = [1.5, -5] / 11; at [1, 1] mean -3.5 / 11, bound + sqrt(4 / 11)
    assert mean(bandit, [1.0, 1.0]) == pytest.approx([-3.5 / 11], abs=1e-12)
    assert bandit.choose([1.0, 1.0]) == (5, "optimizer")  # -.318 + .603
    assert bandit.choose([0.0, 1.0]) == (5, "optimizer")  # -.4545 + sqrt(3 / 11) = +.0677
    bandit.learn((5, "optimizer"), [0.0, 1.0], -0.5)
    # A = [[3, 2], [2, 6]], b = [-.5, -2.5]; theta = [2, -6.5] / 14; at [0, 1]: -.464 + sqrt(3 / 14) = -.0013
    assert mean(bandit, [0.0, 1.0]) == pytest.approx([-6.5 / 14], abs=1e-12)
    assert bandit.choose([0.0, 1.0]) == STAY


def test_many_observations_match_numpy_least_squares() -> None:
    rng, bandit = np.random.default_rng(0), Bandit(ARMS, 8)
    x_ND, reward_N = rng.standard_normal((50, 8)), rng.standard_normal(50)
    for x_D, reward in zip(x_ND, reward_N, strict=True):
        bandit.learn(ARMS[1], x_D.tolist(), float(reward))
    padded = np.vstack([x_ND, np.eye(8)]), np.append(reward_N, np.zeros(8))  # ridge as least squares with extra rows
    theta_D = np.linalg.lstsq(*padded, rcond=None)[0]
    context = rng.standard_normal(8)
    assert mean(bandit, context) == pytest.approx([0.0, float(theta_D @ context), 0.0], abs=1e-10)


def test_it_finds_the_best_arm_of_each_context() -> None:
    rng, bandit = np.random.default_rng(1), Bandit(ARMS, 4)
    theta_KD = np.array([[0.1, 1.0, 0.0, 0.0], [0.1, -1.0, 0.0, 0.0], [-0.5, 0.0, 0.2, 0.0]])
    right = 0
    for trial in range(600):
        x_D = np.append(1.0, rng.uniform(-1, 1, 3))
        arm = bandit.choose(x_D.tolist())
        real_K = theta_KD @ x_D
        if trial >= 400:
            right += arm == (ARMS[int(real_K.argmax())] if real_K.max() > 0 else STAY)
        if arm != STAY:
            bandit.learn(arm, x_D.tolist(), float(real_K[ARMS.index(arm)] + 0.1 * rng.standard_normal()))
    assert right >= 180


def test_it_stays_where_every_jump_hurts() -> None:
    rng, bandit = np.random.default_rng(2), Bandit(ARMS, 4)
    chosen = []
    for _ in range(300):
        x_D = np.append(1.0, rng.uniform(-1, 1, 3)).tolist()
        chosen.append(bandit.choose(x_D))
        if chosen[-1] != STAY:
            bandit.learn(chosen[-1], x_D, -0.5 + 0.1 * rng.standard_normal())
    assert chosen[0] != STAY and chosen[-100:].count(STAY) >= 95


def test_state_goes_on_bit_for_bit_and_wrong_use_is_refused() -> None:
    one, other = Bandit(ARMS, 2), Bandit(ARMS, 2)
    one.learn(ARMS[0], [1.0, 0.3], 0.7)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for bandit in (one, other):
        bandit.learn(ARMS[2], [1.0, -0.1], 0.1)
    assert json.dumps(one.state_dict()) == json.dumps(other.state_dict())
    with pytest.raises(ValueError, match="are not"):
        Bandit(ARMS[:2], 2).load_state_dict(one.state_dict())
    for arm, context, reward in ((STAY, [1, 0], 0.0), (ARMS[0], [1], 0.0), (ARMS[0], [1, 0], float("nan"))):
        with pytest.raises(ValueError):
            one.learn(arm, context, reward)
    with pytest.raises(ValueError):
        Bandit([STAY], 2)
