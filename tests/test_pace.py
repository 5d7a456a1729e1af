"""How often an upstream is asked: a rate for all replicas, pauses that it asks for, and a breaker."""

import asyncio
import time

import pytest

from oncegate.reconcile.pace import FAILURES, MAX_OPEN_S, MAX_PAUSE_S, MIN_OPEN_S, Breaker, Pace, asked_pause_s
from tests.stores import connected

A, B = "https://a.test", "https://b.test"


def now_ms() -> int:
    return int(time.time() * 1000)


@pytest.fixture
async def two(store):
    """Two replicas on one store of each kind."""
    async with connected(store.url) as one, connected(store.url) as other:
        clock = asyncio.get_running_loop().time
        yield Pace(one, clock), Pace(other, clock)


async def test_all_replicas_together_keep_the_rate(two):
    """Of twelve questions at once on two replicas, none leaves sooner than the rate allows; none is forgotten."""
    taken: list[float] = []

    async def take(pace: Pace) -> None:
        assert await pace.take(A, 20, now_ms, patience_s=20) == 0.0
        taken.append(time.monotonic())

    began = time.monotonic()
    await asyncio.gather(*[take(two[number % 2]) for number in range(12)])
    # The first leaves at once, each other one 50 ms behind the one before it.
    assert taken[-1] - began >= 11 * 0.05 - 0.005


async def test_upstreams_have_rates_of_their_own_and_who_has_no_patience_hears_how_long(two):
    assert await two[0].take(A, 1, now_ms) == 0.0
    assert 0 < await two[1].take(A, 1, now_ms) < 1.5
    assert await two[1].take(B, 1, now_ms) == 0.0


async def test_an_upstream_that_asks_for_a_pause_has_it_from_all_replicas(two):
    assert await two[0].take(A, 1000, now_ms) == 0.0
    await two[0].pause(A, 30, now_ms)
    assert 25 < await two[0].take(A, 1000, now_ms) <= 30
    assert 25 < await two[1].take(A, 1000, now_ms) <= 30
    await two[1].pause(A, 1, now_ms)
    assert 25 < await two[0].take(A, 1000, now_ms) <= 30, "a shorter one does not end a longer one"
    await two[1].pause(A, 10**6, now_ms)
    assert await two[1].take(A, 1000, now_ms) <= MAX_PAUSE_S


async def test_a_store_that_does_not_reply_lets_nobody_ask(own_store):
    async with connected(own_store.url) as store:
        pace = Pace(store, asyncio.get_running_loop().time)
        own_store.pause()
        assert await pace.take(A, 10, now_ms) > 0
        own_store.resume()


def test_the_breaker_opens_after_some_failures_in_a_row_and_one_tries_for_all():
    breaker = Breaker()
    for _ in range(FAILURES - 1):
        breaker.failed(10.0)
    assert breaker.wait_s(10.0) == 0
    breaker.failed(10.0)
    assert breaker.is_holding(10.0)
    assert breaker.wait_s(10.5) == pytest.approx(MIN_OPEN_S - 0.5)
    assert breaker.wait_s(11.0) == 0.0, "one"
    assert breaker.wait_s(11.0) > 0.0, "and no other"
    breaker.failed(11.2)
    assert breaker.wait_s(11.2) == pytest.approx(2 * MIN_OPEN_S)
    # Questions that were under way from before it opened change nothing.
    breaker.failed(11.3)
    assert breaker.wait_s(11.3) == pytest.approx(2 * MIN_OPEN_S - 0.1)
    assert breaker.wait_s(13.3) == 0.0
    breaker.answered()
    assert breaker.wait_s(13.3) == 0.0
    assert not breaker.is_holding(13.3)


def test_an_upstream_that_stays_down_is_tried_again_and_again():
    breaker, now_s, tries = Breaker(), 0.0, 0
    for _ in range(FAILURES):
        breaker.failed(now_s)
    while now_s < 300:
        wait_s = breaker.wait_s(now_s)
        if not wait_s:
            tries += 1
            breaker.failed(now_s)
        assert wait_s <= MAX_OPEN_S
        now_s += max(wait_s, 0.01)
    assert 10 <= tries <= 16


@pytest.mark.parametrize(
    ("status", "text", "seconds"),
    [
        (429, b"7", 7),
        (503, b" 0 ", 0),
        (503, b"999999999", MAX_PAUSE_S),
        (503, b"-1", 0),
        (503, b"1.5", 0),
        (503, b"soon", 0),
        (503, b"", 0),
        (503, b"Thu, 99 Foo 2020 00:00:00 GMT", 0),
        (503, b"Wed, 21 Oct 2015 07:28:00 GMT", 0),
        (500, b"7", 0),
        (200, b"7", 0),
        (503, b"\xff" * 20, 0),
        (503, b"Thu, 31 Dec 2026 23:59:59 -99999999999999999999", 0),
    ],
)
def test_the_pause_that_an_answer_asks_for(status, text, seconds):
    assert asked_pause_s(status, [(b"Retry-After", text)]) == seconds
    assert asked_pause_s(status, []) == 0


@pytest.mark.parametrize(
    ("written", "seconds"), [(b"07:28:00", 60), (b"07:30:00", 0), (b"00:00:00", MAX_PAUSE_S), (b"7", 0)]
)
def test_a_date_is_a_pause_too(written, seconds):
    """It counts from the date of the answer, by whatever clock both were written."""
    day = b"Wed, 21 Oct 2015 %b GMT"
    fields = [(b"retry-after", day % b"07:29:00"), (b"date", day % written)]
    assert asked_pause_s(503, fields) == seconds
    assert asked_pause_s(503, fields[:1]) == 0
