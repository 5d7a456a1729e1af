"""How slow a client may be."""

import pytest

from oncegate.downstream.minimum_rate import MinimumRate, RateWatch

PACE = MinimumRate(10.0, 100)  # 1000 bytes in each 10 s


@pytest.mark.parametrize(
    ("steps", "keeps_up"),
    [
        ([(9.9, 0)], True),
        ([(10.0, 0)], False),
        ([(10.0, 999)], False),
        ([(10.0, 1000)], True),
        ([(5.0, 1000), (5.0, 0)], True),
        ([(5.0, 1000), (5.0, 0), (9.9, 0)], True),
        ([(5.0, 1000), (5.0, 0), (10.0, 0)], False),
        ([(1.0, 1_000_000), (9.0, 1), (10.0, 1)], False),  # a good start earns no credit
        ([(0.1, 10)] * 99, True),
        ([(0.0, 1)] * 5000, True),  # what comes at once costs no time
    ],
)
def test_each_window_of_waiting_asks_for_its_bytes(steps, keeps_up):
    """A window that is over with too little moved ends it, whatever came before."""
    watch = RateWatch(PACE)
    assert all(watch.keeps_up(waited_s, moved) for waited_s, moved in steps) is keeps_up


def test_without_a_rate_any_byte_counts():
    """At 0 bytes a second a window asks for one byte."""
    watch = RateWatch(MinimumRate(10.0, 0))
    assert watch.keeps_up(10.0, 1)
    assert not watch.keeps_up(10.0, 0)


def test_what_is_left_of_a_window_is_told():
    """Nobody has to wait for longer than to the end of the window."""
    watch = RateWatch(PACE)
    watch.keeps_up(4.0, 1)
    assert watch.window_left_s == 6.0
    watch.keeps_up(6.0, 1000)
    assert watch.window_left_s == 10.0
