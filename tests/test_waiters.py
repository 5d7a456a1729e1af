"""How often a store is asked for duplicates that wait, and when: each key has a pause of its own, all have a limit."""

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count

import pytest

from oncegate.keys.digests import Digests, Scope
from oncegate.observe.metrics import WAIT_ENDS
from oncegate.store.record import Claim, ClaimRequest
from oncegate.store.store import Store
from oncegate.store.stream_head import StreamHead, pack_head
from oncegate.store.waiters import MAX_POLLS_PER_S, PollSchedule, Waiters, Woken
from tests.conftest import Valkey
from tests.parts import until
from tests.stores import connected

SCOPE = Scope(b"default", b"n" * 16)
TICK_S = 0.001


def key(number: int) -> bytes:
    return Digests(b"").key(SCOPE, b"key-%d" % number)


# The schedule alone, on a clock of the test's own ...


class Clock:
    """Turns the schedule's wheel as the worker's loop does. `polls` has each poll with its time."""

    def __init__(self, schedule: PollSchedule, reply_s: float = 0.001) -> None:
        self.schedule, self._reply_s, self.now_s = schedule, reply_s, 100.0
        self.polls: list[tuple[float, bytes]] = []
        self.is_held_here: set[bytes] = set()

    def run(self, seconds: float) -> None:
        ends_s = self.now_s + seconds
        while self.now_s < ends_s:
            self.now_s += self.schedule.pause_s(self.now_s)
            for one in self.schedule.take_due(self.now_s, lambda key: key not in self.is_held_here):
                self.polls.append((self.now_s, one))
                self.schedule.polled(one, self.now_s + self._reply_s)

    def add(self, *keys: bytes) -> None:
        for one in keys:
            self.schedule.add(one, self.now_s)

    def most_in_a_second(self) -> int:
        times = [time_s for time_s, _ in self.polls]
        return max(bisect_left(times, begin_s + 1) - n for n, begin_s in enumerate(times))

    def of(self, key: bytes) -> list[float]:
        return [time_s for time_s, polled in self.polls if polled == key]


def test_the_pause_of_a_key_grows_to_half_a_second():
    """A key is polled first after 50 ms, then after pauses that grow by half, to half a second."""
    clock = Clock(PollSchedule(500), reply_s=0)
    clock.add(b"one")
    clock.run(3.0)
    pauses = [later - earlier for earlier, later in zip([100.0, *clock.of(b"one")], clock.of(b"one"), strict=False)]
    assert pauses[:6] == pytest.approx([0.05, 0.075, 0.1125, 0.169, 0.253, 0.38], abs=0.02)
    assert pauses[7:] == pytest.approx([0.5] * len(pauses[7:]), abs=0.02)


def test_newcomers_change_nothing_for_the_others():
    """With 100 keys that wait and 10 new ones a second, each old key is still polled twice a second."""
    clock = Clock(PollSchedule(500))
    old = [b"old-%d" % n for n in range(100)]
    clock.add(*old)
    clock.run(3.0)
    clock.polls.clear()
    for n in range(30):
        clock.add(b"new-%d" % n)
        clock.run(0.1)
    assert {len(clock.of(one)) for one in old} <= {5, 6, 7}


@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize("keys", [900, 5000])
def test_no_second_has_more_polls_than_the_limit(workers, keys):
    """However many keys wait and come, a replica polls at most 500 times in any second, and forgets none."""
    clock = Clock(PollSchedule(MAX_POLLS_PER_S / workers))
    mine = [b"key-%d" % n for n in range(keys // workers)]
    for one in mine:
        clock.add(one)
        clock.run(3.0 / len(mine))
    for n in range(40):
        clock.add(b"new-%d" % n)
        clock.run(0.1 / workers)
    clock.run(keys / 400)
    assert clock.most_in_a_second() * workers <= MAX_POLLS_PER_S
    assert {one for _, one in clock.polls} >= set(mine)


def test_what_runs_here_uses_nothing_up():
    """A key whose original runs in this worker is not polled, and takes no place of those that are."""
    clock = Clock(PollSchedule(100))
    here, elsewhere = [b"here-%d" % n for n in range(500)], [b"elsewhere-%d" % n for n in range(10)]
    clock.is_held_here.update(here)
    clock.add(*here, *elsewhere)
    clock.run(2.0)
    assert not [one for _, one in clock.polls if one in clock.is_held_here]
    assert {len(clock.of(one)) for one in elsewhere} <= {6, 7, 8}
    clock.is_held_here.clear()
    clock.polls.clear()
    clock.run(8.0)
    assert {one for _, one in clock.polls} == {*here, *elsewhere}


def test_a_key_that_left_is_polled_no_more():
    """A key without waiters is forgotten, and so is a poll of it that was on its way; if it comes again, it is new."""
    clock = Clock(PollSchedule(500))
    clock.add(b"one", b"two")
    clock.run(1.0)
    clock.schedule.remove(b"one")
    clock.schedule.polled(b"one", clock.now_s)
    clock.polls.clear()
    clock.run(2.0)
    assert clock.of(b"one") == []
    assert len(clock.schedule) == 1
    clock.add(b"one")
    clock.run(0.06)
    assert len(clock.of(b"one")) == 1


def test_every_end_is_counted():
    """The metric has one value for each way a wait can end."""
    assert list(WAIT_ENDS) == [woken.label for woken in Woken]


# With a real store ...


Failures = list[Exception]


async def keep(waiters: Waiters, failures: Failures) -> None:
    """Poll, as the service does: what fails is started anew, and is in `failures`."""
    while True:
        try:
            await waiters.run()
        except ExceptionGroup as group:
            failures.extend(group.exceptions)


@asynccontextmanager
async def running(
    url: str,
    polled: Callable[[], None] = lambda: None,
    is_held_here: Callable[[bytes], bool] = lambda _: False,
    failures: Failures | None = None,
) -> AsyncIterator[tuple[Store, Waiters]]:
    """Yield a store and its waiters, none of whose originals run in this worker."""
    async with connected(url) as store:
        waiters = Waiters(
            store,
            is_held_here,
            max_waiters=2000,
            lease_ms=60_000,
            polls_per_s=MAX_POLLS_PER_S,
            polled=polled,
        )
        task = asyncio.ensure_future(keep(waiters, [] if failures is None else failures))
        try:
            yield store, waiters
        finally:
            waiters.close()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def claim(store: Store, key: bytes) -> Claim:
    claimed = await store.claim(ClaimRequest(key, SCOPE, b"f" * 16, b"hold", 60_000, 60_000, 60_000))
    assert isinstance(claimed, Claim)
    return claimed


def wait(waiters: Waiters, key: bytes, joins: bytes = b"") -> "asyncio.Task[Woken]":
    assert waiters.refusal(key) is None
    loop = asyncio.get_running_loop()
    return loop.create_task(waiters.wait(key, SCOPE, loop.time() + 60, loop.create_future(), lambda: False, joins))


def calls(valkey: Valkey) -> int:
    """Return how many scripts the store has run."""
    with valkey.client() as client:
        return int(client.info("commandstats")["cmdstat_evalsha"]["calls"])


async def test_nine_hundred_that_wait_cost_five_hundred_polls_a_second(valkey):
    """900 duplicates wait for keys that run elsewhere, and 10 more come each second: at most 500 polls a second.

    Each of them hears of the end of its original all the same.
    """
    async with running(valkey.url) as (store, waiters):
        claims = [await claim(store, key(n)) for n in range(910)]
        waits = [wait(waiters, one.key) for one in claims[:900]]
        await asyncio.sleep(0.5)
        clock = asyncio.get_running_loop().time
        before, began_s = calls(valkey), clock()
        for one in claims[900:]:
            waits.append(wait(waiters, one.key))
            await asyncio.sleep(0.1)
        polls, seconds = calls(valkey) - before, clock() - began_s
        assert polls <= MAX_POLLS_PER_S * seconds
        assert polls >= MAX_POLLS_PER_S * seconds / 3
        await asyncio.gather(*[store.mark_unknown(one, "for a test", 5) for one in claims])
        async with asyncio.timeout(20):
            assert set(await asyncio.gather(*waits)) == {Woken.RECORD_CHANGED}
        assert len(waiters) == 0


async def test_a_few_that_wait_hear_of_it_at_once(probe):
    """Duplicates hear within the pause of their key that its record changed, or that it is free."""
    numbers, polls = count(), count()
    async with running(probe.url, lambda: next(polls)) as (store, waiters):
        for settle, expected in (
            (lambda one: store.mark_unknown(one, "for a test", 5), Woken.RECORD_CHANGED),
            (lambda one: store.release(one, 5), Woken.DECLINED),
        ):
            one = await claim(store, key(next(numbers)))
            waits = [wait(waiters, one.key) for _ in range(3)]
            await settle(one)
            async with asyncio.timeout(5):
                assert await asyncio.gather(*waits) == [expected] * 3
        before = next(polls)
        assert before > 0
        await asyncio.sleep(0.3)
        assert next(polls) == before + 1


async def test_a_poll_that_fails_ends_no_wait(probe, monkeypatch):
    """After a failure the loop that polls is started anew, and asks for the keys that it was asking for."""
    async with running(probe.url) as (store, waiters):
        one = await claim(store, key(1))
        peek, failures = store.peek, []

        def fail_once(*arguments):
            if not failures:
                failures.append(RuntimeError("for a test"))
                raise failures[0]
            return peek(*arguments)

        monkeypatch.setattr(store, "peek", fail_once)
        waiting = wait(waiters, one.key)
        await until(lambda: failures)
        await store.mark_unknown(one, "for a test", 5)
        async with asyncio.timeout(10):
            assert await waiting is Woken.RECORD_CHANGED


async def test_what_fails_before_a_poll_forgets_no_key(probe):
    """A key that was due when the loop failed is asked for by the one that is started anew."""
    failures: Failures = []

    def fails_once(_: bytes) -> bool:
        if not failures:
            failures.append(RuntimeError("for a test"))
            raise failures[0]
        return False

    async with running(probe.url, is_held_here=fails_once) as (store, waiters):
        one = await claim(store, key(1))
        waiting = wait(waiters, one.key)
        await until(lambda: failures)
        await store.mark_unknown(one, "for a test", 5)
        async with asyncio.timeout(10):
            assert await waiting is Woken.RECORD_CHANGED


async def test_who_leaves_when_its_poll_is_due_fails_nobodys(valkey):
    """The last that waited for a key leaves between the moment at which it is due and its poll."""
    leaving: list[asyncio.Task[Woken]] = []

    def leaves(_: bytes) -> bool:
        for one in leaving:
            one.cancel()
        return False

    polls: list[None] = []
    failures: Failures = []
    async with running(valkey.url, lambda: polls.append(None), leaves, failures) as (_, waiters):
        leaving.append(wait(waiters, key(1)))
        await asyncio.wait(leaving)
        await until(lambda: polls)
        staying = wait(waiters, key(2))
        await until(lambda: len(polls) > 1)
        assert not failures
        staying.cancel()


HEAD = pack_head(StreamHead(200, b"OK", b"X: 1\r\n", None, False, False, 0))


async def test_who_joins_is_woken_by_the_head_alone(valkey):
    """A duplicate that waits for the end of the same original waits on."""
    async with running(valkey.url) as (store, waiters):
        claimed = await claim(store, key(1))
        joining, waiting = wait(waiters, key(1), claimed.token), wait(waiters, key(1))
        await store.append(claimed, 0, b"chunk", 5, HEAD)
        assert await joining is Woken.HEAD_CAME
        assert not waiting.done()
        await store.mark_unknown(claimed, "lost", 5)
        assert await waiting is Woken.RECORD_CHANGED


async def test_an_older_owner_gives_no_head(valkey):
    """Its response cannot be joined: whoever wants to waits for the end."""
    async with running(valkey.url) as (store, waiters):
        claimed = await claim(store, key(1))
        joining = wait(waiters, key(1), claimed.token)
        await store.append(claimed, 0, b"chunk", 5)
        await until(lambda: not waiters._by_key[key(1)][0].joins)
        await store.append(claimed, 1, b"chunk", 5, b"")
        assert not joining.done()
        await store.release(claimed, 5)
        assert await joining is Woken.DECLINED


async def test_another_claim_is_not_what_it_joins(valkey):
    """A key that was freed and claimed again has changed for who joined its first claim."""
    async with running(valkey.url) as (store, waiters):
        claimed = await claim(store, key(1))
        joining = wait(waiters, key(1), b"another token 16")
        await store.append(claimed, 0, b"chunk", 5, HEAD)
        await asyncio.sleep(0.3)
        assert not joining.done()
        await store.mark_unknown(claimed, "lost", 5)
        assert await joining is Woken.RECORD_CHANGED
