"""Notes from process to process: each comes to the one that it is for, at least once, and none outlives a minute."""

from collections.abc import AsyncIterator

import pytest

from oncegate.store.record import PREFIX_BYTES
from oncegate.store.redis.signals.mailboxes import LASTS_MS, mailbox_of
from oncegate.store.store import MOST_NOTES, Store
from tests.conftest import REDIS_KINDS
from tests.probes import Probe, RedisProbe
from tests.stores import KEY, Behind, connected

CANCEL = b"c" + KEY + b"t" * 16
on_redis = pytest.mark.parametrize("probe", REDIS_KINDS, indirect=True)


@pytest.fixture
def behind() -> Behind:
    return Behind()


@pytest.fixture
async def store(probe: Probe, behind: Behind) -> AsyncIterator[Store]:
    async with connected(probe.url, behind=behind) as store:
        yield store


async def test_a_note_comes_to_the_process_that_the_token_names(store, probe, behind):
    """Whichever of its claims the token is of. A note that was taken does not come again."""
    async with connected(probe.url) as elsewhere:
        assert await elsewhere.post(store.token(), CANCEL) is True
        assert await elsewhere.post(store.token(), CANCEL + b" once more") is True
        assert await elsewhere.collect(elsewhere.token_prefix) == []
        assert sorted(await store.collect(store.token_prefix)) == [CANCEL, CANCEL + b" once more"]
        await behind.run()
        assert await store.collect(store.token_prefix) == []
        # Beside one that others may have, nothing is left.
        assert not isinstance(probe, RedisProbe) or probe.client.exists(mailbox_of(store.token())) == 0


async def test_a_repeated_note_is_one(store):
    """As are those of many readers of one response, and a post whose reply was lost."""
    for _ in range(3):
        assert await store.post(store.token(), CANCEL) is True
    assert await store.collect(store.token_prefix) == [CANCEL]


@on_redis
async def test_a_note_that_nobody_is_known_to_have_taken_comes_again(store, behind):
    """It is removed once it was read. One that comes meanwhile is not removed with it."""
    await store.post(store.token(), b"one")
    assert await store.collect(store.token_prefix) == [b"one"]
    assert await store.collect(store.token_prefix) == [b"one"]
    await store.post(store.token(), b"two")
    await behind.run()
    assert await store.collect(store.token_prefix) == [b"two"]


async def test_many_notes_are_taken_one_part_after_the_other(store, behind):
    """All of them come."""
    sent = {b"note %d" % number for number in range(2 * MOST_NOTES + 5)}
    for note in sent:
        await store.post(store.token(), note)
    taken = []
    while notes := await store.collect(store.token_prefix):
        assert len(notes) <= MOST_NOTES
        taken += notes
        await behind.run()
    assert len(taken) == len(sent)
    assert set(taken) == sent


@on_redis
async def test_a_process_that_died_leaves_nothing(store, probe: RedisProbe):
    """Its mailbox expires a minute after the last note."""
    dead = b"d" * PREFIX_BYTES
    for note in (b"one", b"two"):
        probe.client.pexpire(mailbox_of(dead), 1)
        assert await store.post(dead + bytes(6), note) is True
        assert LASTS_MS - 10_000 < probe.client.pttl(mailbox_of(dead)) <= LASTS_MS


@on_redis
async def test_at_the_memory_limit(store, probe: RedisProbe):
    """A note is delivered, so that a call can be stopped."""
    probe.client.config_set("maxmemory", 1)
    try:
        assert await store.post(store.token(), CANCEL) is True
        assert await store.collect(store.token_prefix) == [CANCEL]
    finally:
        probe.client.config_set("maxmemory", 0)


@on_redis
async def test_a_store_that_forgot_its_scripts(store, probe: RedisProbe):
    """It gets them again."""
    probe.client.script_flush()
    assert await store.post(store.token(), CANCEL) is True


async def test_a_store_that_is_away(store):
    """A post says so, and a collection finds nothing."""
    await store.close()
    store.end_calls()
    assert await store.post(store.token(), CANCEL) is False
    assert await store.collect(store.token_prefix) == []


@on_redis
async def test_something_else_in_its_place(store, probe: RedisProbe):
    """Nothing is raised, and nothing comes."""
    probe.client.set(mailbox_of(store.token()), "x")
    assert await store.collect(store.token_prefix) == []
