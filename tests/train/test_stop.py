import os
import signal

import pytest

from scale.parallel.ranks import Ranks
from scale.train.stop import StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_sets_the_reason_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


class Late(Ranks):
    """Two ranks, of which this one gets a signal while it asks the other."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.answers: list[bool] = []

    def any(self, flag: bool) -> bool:
        self.answers.append(flag)
        signal.raise_signal(signal.SIGUSR1)
        return flag  # the other rank heard of none


def test_a_signal_that_comes_while_ranks_agree_counts_at_the_next_step() -> None:
    ranks = Late()
    with StopSignal(ranks) as stop:
        assert stop.asked() is None, "the other rank goes on"
        assert stop.asked() == "SIGUSR1" and ranks.answers == [False, True]
