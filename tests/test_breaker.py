"""When the circuit breaker opens, and when it closes."""

import pytest

from oncegate.store.health.breaker import FAILURES, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock)


def fail(breaker: Breaker, clock: Clock, seconds: float = 1.0) -> None:
    """Fail a claim that takes so many seconds."""
    began = clock.now
    clock.now += seconds
    breaker.failed(began)


def test_failures_in_a_row_open_it(breaker, clock):
    """FAILURES claims that fail one after the other open the breaker, which reports it once."""
    opened = []
    breaker = Breaker(clock, lambda: opened.append(clock.now))
    for n in range(FAILURES + 2):
        assert breaker.open is (n >= FAILURES)
        fail(breaker, clock)
    assert opened == [100.0 + FAILURES]


def test_failures_at_once_are_one(breaker, clock):
    """A hundred claims that wait for one slow reply count as one failure."""
    clock.now += 1
    for n in range(100):
        breaker.failed(100 + n / 1000)
        clock.now += 0.001
    assert not breaker.open
    fail(breaker, clock)
    assert not breaker.open


def test_a_constant_stream_of_failures_opens_it(breaker, clock):
    """Overlapping claims that fail open the breaker after FAILURES times their duration."""
    while not breaker.open:
        clock.now += 0.01
        breaker.failed(clock.now - 1.0)
    assert FAILURES - 1 <= clock.now - 100 <= FAILURES


def test_a_success_in_between_starts_anew(breaker, clock):
    """Any reply starts the count of failures anew."""
    for _ in range(5):
        for _ in range(FAILURES - 1):
            fail(breaker, clock)
        breaker.succeeded()
    assert not breaker.open


def test_it_closes_when_a_probe_succeeds(breaker, clock):
    """A probe that succeeds closes the breaker, and it takes as many failures to open it again."""
    for _ in range(FAILURES):
        fail(breaker, clock)
    breaker.succeeded()
    assert not breaker.open
    for n in range(FAILURES):
        assert breaker.open is False, n
        fail(breaker, clock)
    assert breaker.open
