"""Readers elsewhere are woken when a response goes on, where the server lets them; only then is anything said."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.crc import key_slot

from oncegate.store.record import Claim
from oncegate.store.record_name import store_key
from oncegate.store.redis.signals import wakes
from oncegate.store.redis.signals.mailboxes import mailbox_of
from oncegate.store.redis.signals.wakes import channel_of, mail_channel_of
from oncegate.store.results import AppendStatus, SettleResult, SettleStatus
from oncegate.store.store import Store
from tests.conftest import Valkey
from tests.parts import until
from tests.stores import KEY, PATIENCE_S, answer, claimed, connected, key
from tests.test_redis_store import ACL

HEAD = b"head"
READING_MS = 5000
# What a user needs beside the rights of the scripts.
MAY_LISTEN = ("&once:wake:*", "+subscribe", "+unsubscribe")
MAY_PUBLISH = ("&once:wake:*", "+publish")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakes, "CHECK_S", 0.05)


class Reader:
    """Somebody who watches one key."""

    def __init__(self, store: Store, of: bytes = KEY) -> None:
        self.woken, self._store, self._key = 0, store, of
        self.stop = store.wakes.watch(of, self.wake)

    def wake(self) -> None:
        self.woken += 1

    @property
    def is_live(self) -> bool:
        return self._store.wakes.is_live(self._key)

    async def live(self) -> None:
        """Wait until it is told of its key, and begin to count."""
        await until(lambda: self.is_live)
        self.woken = 0


@pytest.fixture
async def owners(empty_server: Valkey) -> AsyncIterator[Store]:
    async with connected(empty_server.url) as store:
        yield store


@pytest.fixture
async def readers(empty_server: Valkey) -> AsyncIterator[Store]:
    async with connected(empty_server.url) as store:
        yield store


async def followed(owners: Store, readers: Store, of: bytes = KEY) -> Claim:
    """Return a claim whose response has begun, and is read elsewhere."""
    owner = await claimed(owners, key=of)
    assert await owners.append(owner, 0, b"0", PATIENCE_S, HEAD) is AppendStatus.APPENDED
    await readers.follow(of, owner.token, 0, READING_MS)
    return owner


async def test_each_chunk_and_the_end_wake_a_reader(owners, readers):
    """All readers of the key, and nobody else; and nobody who has left."""
    owner = await followed(owners, readers)
    one, two, other = Reader(readers), Reader(readers), Reader(readers, key(2))
    for reader in (one, two, other):
        await reader.live()
    assert await owners.append(owner, 1, b"1", PATIENCE_S) is AppendStatus.APPENDED_READ
    await until(lambda: (one.woken, two.woken) == (1, 1))
    two.stop()
    assert await owners.append(owner, 2, b"2", PATIENCE_S) is AppendStatus.APPENDED_READ
    await until(lambda: one.woken == 2)
    assert await owners.store(owner, answer(b"0", b"1", b"2"), b"", PATIENCE_S) == SettleResult(SettleStatus.STORED)
    await until(lambda: one.woken == 3)
    one.stop()
    one.stop()
    await asyncio.sleep(0)
    assert (one.woken, two.woken, other.woken) == (3, 1, 0)
    assert not one.is_live


@pytest.mark.parametrize("how", ["release", "mark unknown"])
async def test_every_end_wakes(owners, readers, how):
    """A reader is broken off at once."""
    owner = await followed(owners, readers)
    reader = Reader(readers)
    await reader.live()
    await owners.append(owner, 1, b"1", PATIENCE_S)
    await until(lambda: reader.woken == 1)
    await (owners.release(owner, PATIENCE_S) if how == "release" else owners.mark_unknown(owner, "lost", PATIENCE_S))
    await until(lambda: reader.woken == 2)


async def test_where_nobody_reads_nothing_is_said(owners, readers, empty_server):
    """No message, and no connection; and none any more once the last reader has left."""
    with empty_server.client() as client:
        # Those of the test before are about to close.
        await until(lambda: client.client_list(_type="pubsub") == [])
        client.config_resetstat()
        owner = await claimed(owners)
        for index in range(3):
            assert await owners.append(owner, index, b"x", PATIENCE_S, b"" if index else HEAD) is AppendStatus.APPENDED
        await owners.store(owner, answer(b"x", b"x", b"x"), b"", PATIENCE_S)
        assert "cmdstat_publish" not in client.info("commandstats")
        assert client.client_list(_type="pubsub") == []
        reader = Reader(readers)
        await reader.live()
        assert len(client.client_list(_type="pubsub")) == 1
        reader.stop()
        await until(lambda: client.client_list(_type="pubsub") == [])
        assert await wake_of(readers, owners)


async def wake_of(readers: Store, owners: Store, of: bytes = key(3)) -> bool:
    """Return whether a new reader is woken by the next chunk of a new response."""
    owner = await followed(owners, readers, of)
    reader = Reader(readers, of)
    await reader.live()
    await owners.append(owner, 1, b"1", PATIENCE_S)
    await until(lambda: reader.woken > 0)
    reader.stop()
    return True


async def test_a_connection_that_ends(owners, readers, empty_server):
    """Nothing is live meanwhile. A reader is woken by the new subscription: it may have missed something."""
    reader = Reader(readers)
    await reader.live()
    with empty_server.client() as client:
        client.client_kill_filter(_type="pubsub")
        await until(lambda: reader.woken == 1)
        await until(lambda: reader.is_live)
    assert await wake_of(readers, owners)


async def test_a_server_that_hangs(own_valkey):
    """It is noticed, and a reader polls until it answers again."""
    async with connected(own_valkey.url, timeout_ms=200) as store:
        reader = Reader(store)
        await reader.live()
        own_valkey.pause()
        await until(lambda: not reader.is_live)
        own_valkey.resume()
        await until(lambda: reader.is_live)
        assert reader.woken > 0


@asynccontextmanager
async def limited(server: Valkey, *rights: str) -> AsyncIterator[Store]:
    """A store whose user has the rights of the scripts, and these."""
    permit(server, "reset", ">pw", *ACL, *rights)
    with server.client() as client:
        client.acl_log_reset()
    async with connected(server.url.replace("redis+unix://", "redis+unix://gate:pw@")) as store:
        yield store


def permit(server: Valkey, *rights: str) -> None:
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "gate", *rights)


async def test_a_user_who_may_not_listen(empty_server, owners, monkeypatch):
    """Nothing is live, and all else goes on. The server is asked again after a while."""
    monkeypatch.setattr(wakes, "REFUSED_S", 0.2)
    async with limited(empty_server) as readers:
        reader = Reader(readers)
        owner = await followed(owners, readers)
        await until(lambda: refusals(empty_server) >= 2)
        assert not reader.is_live
        assert await owners.append(owner, 1, b"1", PATIENCE_S) is AppendStatus.APPENDED_READ
        permit(empty_server, *MAY_LISTEN)
        await reader.live()


def refusals(server: Valkey) -> int:
    """Return how often the server has refused a right."""
    with server.client() as client:
        return sum(entry["count"] for entry in client.acl_log())


async def test_a_user_who_may_not_publish(empty_server, readers, monkeypatch):
    """Chunks and settlements are as ever, and the server is not asked each time."""
    monkeypatch.setattr(wakes, "REFUSED_S", 0.2)
    async with limited(empty_server) as owners:
        owner = await followed(owners, readers)
        reader = Reader(readers)
        await reader.live()
        for index in range(1, 20):
            assert await owners.append(owner, index, b"x", PATIENCE_S) is AppendStatus.APPENDED_READ
        assert 1 <= refusals(empty_server) < 19
        assert reader.woken == 0
        permit(empty_server, *MAY_PUBLISH)
        await asyncio.sleep(0.25)
        whole = answer(b"0", *[b"x"] * 19)
        assert await owners.store(owner, whole, b"", PATIENCE_S) == SettleResult(SettleStatus.STORED)
        await until(lambda: reader.woken == 1)


async def test_half_of_the_messages_lost(owners, readers):
    """A reader that looks whenever it is woken, and now and then by itself, has read all in the end."""
    owner = await followed(owners, readers)
    news, chunks = asyncio.Event(), []
    readers.wakes.watch(KEY, news.set)
    await until(lambda: readers.wakes.is_live(KEY))
    tell, said = owners.wakes._tell, iter(range(1000))
    owners.wakes._tell = lambda key: tell(key) if next(said) % 2 else None

    async def read() -> None:
        while len(chunks) < 40:
            found = await readers.follow(KEY, owner.token, len(chunks), READING_MS)
            chunks.extend(found.chunks)
            news.clear()
            if len(chunks) >= found.count:
                await asyncio.wait({asyncio.ensure_future(news.wait())}, timeout=0.05)

    reading = asyncio.ensure_future(read())
    for index in range(1, 40):
        assert await owners.append(owner, index, b"%d" % index, PATIENCE_S) is AppendStatus.APPENDED_READ
    await reading
    assert chunks == [b"%d" % index for index in range(40)]


def test_a_channel_has_the_slot_of_its_record():
    """As sharded messages need it, and a user's rights can name all channels."""
    token = b"prefix" * 3
    assert key_slot(channel_of(KEY)) == key_slot(store_key(KEY))
    assert key_slot(mail_channel_of(token)) == key_slot(mailbox_of(token))
    assert channel_of(KEY).startswith(b"once:wake:")
    assert mail_channel_of(token).startswith(b"once:wake:")


# Mail ...


async def told_of_mail(store: Store) -> asyncio.Event:
    """Return what is set when a store tells of a note, once it has heard from itself."""
    told = asyncio.Event()
    store.wakes.watch_mail(told.set)
    await until(lambda: store.wakes.tells_of_mail)
    told.clear()
    return told


async def test_a_note_wakes_the_process_that_it_is_for(owners, readers):
    """And no other."""
    told, elsewhere = await told_of_mail(owners), await told_of_mail(readers)
    assert await readers.post(owners.token(), b"note")
    await asyncio.wait_for(told.wait(), 5)
    assert await owners.collect(owners.token_prefix) == [b"note"]
    await asyncio.sleep(0)
    assert not elsewhere.is_set()


async def test_a_process_without_mail_says_nothing(owners, empty_server):
    """Its connection is idle, once it has heard from itself; one that reads a response is asked whether it lives."""
    await told_of_mail(owners)
    with empty_server.client() as client:
        client.config_resetstat()
        await asyncio.sleep(5 * wakes.CHECK_S)
        spent = client.info("commandstats")
        assert not {"cmdstat_ping", "cmdstat_publish", "cmdstat_hgetall"} & spent.keys()
        Reader(owners)
        await until(lambda: "cmdstat_ping" in client.info("commandstats"))


async def test_a_process_that_hears_nothing_any_more(owners, monkeypatch):
    """It finds out within a minute, and looks by itself until it hears again. The connection was never closed."""
    monkeypatch.setattr(wakes, "REFUSED_S", 0.1)
    await told_of_mail(owners)
    owners.wakes._tell = lambda channel: None
    await until(lambda: not owners.wakes.tells_of_mail)
    del owners.wakes._tell
    await until(lambda: owners.wakes.tells_of_mail)


async def test_a_mail_connection_that_ends(owners, empty_server):
    """It is made anew, and its process looks at once: a note may have come meanwhile."""
    told = await told_of_mail(owners)
    with empty_server.client() as client:
        client.client_kill_filter(_type="pubsub")
        await until(lambda: not owners.wakes.tells_of_mail)
        await asyncio.wait_for(told.wait(), 5)
        await until(lambda: owners.wakes.tells_of_mail)


@pytest.mark.parametrize("rights", [(), MAY_LISTEN, MAY_PUBLISH], ids=["neither", "may listen", "may publish"])
async def test_a_user_who_may_not_hear_of_mail(empty_server, rights, monkeypatch):
    """Who may only listen hears nothing of what others must not say: its process looks by itself, until it may both."""
    monkeypatch.setattr(wakes, "REFUSED_S", 0.2)
    async with limited(empty_server, *rights) as store:
        told = asyncio.Event()
        store.wakes.watch_mail(told.set)
        await until(lambda: refusals(empty_server) >= 1)
        assert not store.wakes.tells_of_mail
        assert await store.post(store.token(), b"note")
        permit(empty_server, *MAY_LISTEN, *MAY_PUBLISH)
        await until(lambda: store.wakes.tells_of_mail)
