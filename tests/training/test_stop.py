"""Which signals count from when."""

import os
import signal
from collections.abc import Iterator

import pytest

from qwenvl_dist.training.stop import StopSignal


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_schedulers_warning_counts_from_the_start_and_sigterm_once_all_have_joined() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal()
    assert signal.getsignal(signal.SIGTERM) is before
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.received == "SIGUSR1"
    stop.joined()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == "SIGTERM"
