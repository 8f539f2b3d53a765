"""Who keeps the others waiting."""

import pytest

from qwenvl_dist.training.pace import Pace, laggard, spread

HOSTS = ["node1", "node1", "node2", "node2"]


def test_a_node_is_as_slow_as_its_slowest_rank() -> None:
    assert spread([1.0, 1.5, 1.1, 1.2], HOSTS) == {"fastest": 1.2, "median": 1.2, "slowest": 1.5}


@pytest.mark.parametrize(
    ("seconds", "step_seconds", "named"),
    [
        ([1.0, 1.0, 1.0, 1.25], 3.0, 3),
        ([1.3, 1.0], 3.0, 0),  # of two, the other one is the measure
        ([1.0, 1.0, 1.0, 1.15], 3.0, None),  # 15% behind
        ([0.01, 0.01, 0.01, 0.02], 3.0, None),  # twice as slow at what takes no time
        ([0.0, 0.0, 0.0, 0.0], 3.0, None),
    ],
)
def test_a_rank_is_named_when_it_lags_by_a_fifth_and_that_costs_something(
    seconds: list[float], step_seconds: float, named: int | None
) -> None:
    slow = laggard(seconds, HOSTS[: len(seconds)], step_seconds)
    assert (slow.rank if slow else None) == named
    if slow:
        assert slow.host == HOSTS[slow.rank] and slow.over_median == pytest.approx(
            slow.seconds / min(seconds) - 1
        )


def test_a_forward_pass_that_exchanges_counts_for_nothing() -> None:
    for exchanges_nothing in (True, False):
        pace = Pace(exchanges_nothing=exchanges_nothing)
        with pace.forward():
            sum(range(100_000))
        assert (pace.take() > 0) == exchanges_nothing
        assert pace.take() == 0
