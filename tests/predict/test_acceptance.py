"""A jump in parts on weights that a test knows, and the batches it is checked on."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.config.predict import GuardConfig
from scale.parallel.ranks import Ranks
from scale.predict.acceptance import CheckBatches, jump_in_parts
from scale.predict.packing import pack
from tests.parallel.lm import Rows


class Walker:
    """One number that is moved: the sum of coefficients. `far` is how far it may be before its drift is 1."""

    def __init__(self, far=1e9):
        self.at, self.far, self.seeds = 0.0, far, []

    def apply(self, vectors, c_G, seed, *more):
        self.at += c_G[0]
        self.seeds.append(seed)

    def rollback(self):
        self.at = 0.0

    def drift(self):
        return abs(self.at) / self.far


def reach(horizon):
    """A step is as long as the other."""
    return [[float(step)] for step in range(1, horizon + 1)]


def run(valley, horizon=12, far=1e9, **guard):
    """Walk towards `valley`: the loss is the distance from it."""
    walker = Walker(far)
    found = jump_in_parts(
        walker, [], reach(horizon), GuardConfig(**({"correction_interval": 4} | guard)), abs(valley),
        lambda: abs(walker.at - valley), seed=100,
    )  # fmt: skip
    return found, walker


def test_all_parts_are_kept_while_the_loss_falls():
    found, walker = run(valley=20)
    assert (found.steps, found.rejected, found.forwards, walker.at) == (12, 0, 3, 12.0)
    assert found.parts == [[4.0], [4.0], [4.0]] and walker.seeds == [100, 101, 102] and found.after == 8


def test_a_part_beyond_the_valley_is_taken_back_and_tried_at_half_its_length():
    found, walker = run(valley=5.5)
    assert walker.at == 6.0 and found.parts == [[4.0], [2.0]] and found.after == 0.5
    assert found.forwards >= 3 and found.why == "loss"


def test_nothing_is_kept_where_the_loss_rises():
    found, walker = run(valley=-3)
    assert (found.steps, walker.at, found.parts, found.after, found.forwards) == (0, 0.0, [], 3, 2)


def test_the_interval_grows_after_parts_that_lowered_the_loss():
    found, _ = run(valley=100, horizon=30, growth=2)
    assert found.parts == [[4.0], [8.0], [16.0], [2.0]]


def test_the_interval_grows_no_more_after_it_was_halved():
    """Grown to 8, halved to 4 by a check that does not fall: from then on parts of 4, though each lowers the loss."""
    walker, heights = Walker(), iter([9.0, 9.5, 8.0, 7.0, 6.0])
    guard = GuardConfig(correction_interval=4, growth=2)
    found = jump_in_parts(walker, [], reach(16), guard, 10.0, lambda: next(heights), seed=0)
    assert found.parts == [[4.0], [4.0], [4.0], [4.0]] and (found.steps, found.rejected, found.forwards) == (16, 8, 5)


def test_weights_never_drift_further_than_allowed():
    found, walker = run(valley=100, far=50.0, drift=0.1)
    assert walker.at == 4.0 and found.why == "drift", "4 and 4 x 1/2 more would be 6 of 5 allowed"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_keeps_nothing(bad):
    walker = Walker()
    found = jump_in_parts(walker, [], reach(8), GuardConfig(), 5.0, lambda: bad, 0)
    assert found.steps == 0 and walker.at == 0 and found.after == 5.0 and found.why == "not finite"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.floats(1, 4), st.lists(st.floats(0, 10), min_size=70, max_size=70))
def test_what_is_kept_is_made_of_the_kept_parts_and_never_longer_than_the_horizon(horizon, interval, growth, losses):
    walker, heights = Walker(), iter(losses)
    guard = GuardConfig(correction_interval=interval, growth=growth)
    found = jump_in_parts(walker, [], reach(horizon), guard, 5.0, lambda: next(heights), 0)
    assert found.steps <= horizon and walker.at == pytest.approx(sum(c for (c,) in found.parts))
    assert walker.at <= found.steps + 1e-9
    assert found.after <= 5.0 and (found.after < 5.0) == (found.steps > 0)
    assert found.forwards <= len(found.parts) + 2


def ids(batch):
    return batch["input_ids"].tolist()


def checked(rank, world_size):
    check = CheckBatches(lambda group: 0.0, Ranks(rank, world_size))
    check.draw(Rows(rank, world_size))
    return check


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2), (2, 4), (1, 4), (3, 3), (2, 5)])
def test_another_number_of_ranks_scores_every_batch_as_often(before, after):
    old = [checked(rank, before) for rank in range(before)]
    batches = [[{key: pack(tensor) for key, tensor in batch.items()} for batch in c.group.batches] for c in old]
    state = {"drawn": 1, "tokens": old[0].group.tokens, "batches": batches}
    new = [CheckBatches(lambda group: 0.0, Ranks(rank, after)) for rank in range(after)]
    for check in new:
        check.load_state_dict(json.loads(json.dumps(state)))
        assert check.drawn == 1
    counts = [len(check.group.batches) for check in new]
    assert len(set(counts)) == 1, "ranks that meet in forward passes need as many"
    was = sorted(str(ids(batch)) for check in old for batch in check.group.batches)
    now = sorted(str(ids(batch)) for check in new for batch in check.group.batches)
    times = len(now) // len(was)
    assert now == sorted(was * times) and new[0].group.tokens == times * old[0].group.tokens


def test_batches_are_drawn_once_and_survive_bit_for_bit():
    source = Rows()
    check = CheckBatches(lambda group: float(len(group.batches)), Ranks(), tokens=400)
    check.draw(source)
    check.draw(source)
    assert source.drawn == check.drawn == 3 and check.group.tokens == 3 * 192 and check.loss() == 18.0
    again = CheckBatches(lambda group: 0.0, Ranks())
    again.load_state_dict(json.loads(json.dumps(check.state_dict())))
    for one, two in zip(check.group.batches, again.group.batches, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
        assert all(one[k].dtype == two[k].dtype for k in one)
