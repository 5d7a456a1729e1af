"""A store's user who may not do all that a request needs: the proxy is not ready, and no key is lost to it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis import Redis

from oncegate.store.membership import Membership
from oncegate.store.record import PREFIX_BYTES, Claim
from oncegate.store.record_name import store_key
from oncegate.store.record_view import Deciding
from oncegate.store.results import ClaimsSuspended, Forbidden, NotAttempted, ResolveStatus, StoreEvent
from oncegate.store.store import Store
from tests.conftest import Valkey
from tests.parts import until
from tests.stores import TEST_LAYOUT, Behind, claim, claimed, connected, key
from tests.test_redis_store import ACL


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oncegate.store.redis.node.HEALTH_S", 0.05)


def member(quarantine_ms: int = 0) -> Membership:
    def ignore(_event: StoreEvent, _text: str) -> None: ...

    return Membership(bytes(PREFIX_BYTES), "one", "namespace=a", False, 60_000, quarantine_ms, 60.0, True, ignore)


@asynccontextmanager
async def used_by(
    valkey: Valkey, *rights: str, quarantine_ms: int = 0, behind: Behind | None = None
) -> AsyncIterator[Store]:
    """A store that is watched by a proxy whose user has the rights of the documents, and these."""
    with valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "gate", "reset", ">pw", *ACL, *rights)
    url = valkey.url.replace("redis+unix://", "redis+unix://gate:pw@")
    async with connected(url, timeout_ms=500, member=member(quarantine_ms), behind=behind) as store:
        watch = asyncio.ensure_future(store.watch())
        yield store
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


def records(valkey: Valkey) -> list[bytes]:
    with valkey.client() as client:
        return list(client.scan_iter("once:{*"))


def permit(client: Redis, *rights: str) -> None:
    client.execute_command("ACL", "SETUSER", "gate", *rights)


async def test_a_user_with_the_rights_of_the_documents(valkey):
    """The probe of a new connection succeeds and leaves nothing."""
    async with used_by(valkey) as store:
        assert store.not_ready_reason() is None
        owner = await claim(store)
        assert isinstance(owner, Claim)
        mark = store_key(owner.key) + b":test"
        assert [await store.marks.swap(mark, b"", one, 60_000) for one in (b"one", b"two")] == [True, False]
        assert await store.marks.swap(mark, b"one", b"", 1) is True
        seen = Deciding(owner.token, seen_lease=0)
        assert await store.release_by_operator(owner.key, seen, store.token(), b"1") is ResolveStatus.RUNNING
    await until(lambda: len(records(valkey)) == 1)


@pytest.mark.parametrize("verb", ["hset", "pexpire", "hmget", "exists", "unlink", "hdel", "hlen", "hget"])
async def test_a_user_without_one_right(valkey, verb):
    """Without one command of a claim or a settle the store is not ready, and takes no claims until it is given."""
    with valkey.client() as client:
        async with used_by(valkey, f"-{verb}") as store:
            assert verb in (store.not_ready_reason() or "")
            found = await claim(store)
            assert isinstance(found, NotAttempted | ClaimsSuspended)
            if verb != "unlink":  # without it nothing can be freed: the probe's record expires
                await until(lambda: records(valkey) == [])
            permit(client, f"+{verb}")
            await until(lambda: store.not_ready_reason() is None)
            await claimed(store)


@pytest.mark.parametrize("verb", ["get", "setrange", "append"])
async def test_a_user_made_for_an_older_version(valkey, verb):
    """Without a right that packed records need, the store is ready, and no proxy packs records until it is given."""
    with valkey.client() as client:
        async with used_by(valkey, f"-{verb}") as store:
            await until(lambda: lets_write(client) == 1)
            assert store.not_ready_reason() is None
            await claimed(store)
            permit(client, f"+{verb}")
            store.nodes[0].link.renew("with another right")
            await until(lambda: lets_write(client) == 2)


def lets_write(client: Redis) -> int:
    """Return the highest layout that the proxy last let others write, 0 before it said so."""
    said = {int(at): int(name[-1:]) for name, at in client.hgetall("once:members").items() if name.count(b" ") == 2}
    return said[max(said)] if said else 0


async def test_a_user_who_may_only_read(valkey):
    """A read-only user makes the store not ready from the start."""
    async with used_by(valkey, "resetkeys", "%R~once:*") as store:
        assert "cannot be used" in (store.not_ready_reason() or "")
        assert isinstance(await claim(store), ClaimsSuspended)
    assert records(valkey) == []


@pytest.mark.parametrize("denied", ["once:epoch", "once:replica:*", "once:identities", "once:members"])
@pytest.mark.parametrize("quarantine_ms", [0, 60_000])
async def test_a_user_who_may_not_touch_what_shows_losses(valkey, denied, quarantine_ms):
    """First-time keys are refused while losses or other proxies cannot be seen, whatever is to happen after one."""
    every = {"once:{*", "once:epoch", "once:replica:*", "once:identities", "once:members"}
    allowed = [f"~{one}" for one in every - {denied}]
    async with used_by(valkey, "resetkeys", *allowed, quarantine_ms=quarantine_ms) as store:
        assert "losses and other proxies" in (store.not_ready_reason() or "")
        assert isinstance(await claim(store), ClaimsSuspended)
        with valkey.client() as client:
            permit(client, f"~{denied}")
        await until(lambda: "losses and other proxies" not in (store.not_ready_reason() or ""))
        assert isinstance(await claim(store), ClaimsSuspended if quarantine_ms else Claim)


@pytest.mark.parametrize(("layout", "verb", "left"), [("hash", "pexpire", 2), ("packed", "set", 1)])
async def test_a_right_that_is_taken_away(valkey, monkeypatch, layout, verb, left):
    """The first claim that fails for want of a right is withdrawn, and from then on none is sent."""
    monkeypatch.setenv(TEST_LAYOUT, layout)
    behind = Behind()
    async with used_by(valkey, behind=behind) as store:
        await claimed(store, key=key(1))
        with valkey.client() as client:
            permit(client, f"-{verb}")
            found = await claim(store, key(2))
            assert isinstance(found, Forbidden)
            assert len(records(valkey)) == left  # HSET was executed, PEXPIRE was not
            await behind.run()
            assert len(records(valkey)) == 1
            assert verb in (store.not_ready_reason() or "")
            assert isinstance(await claim(store, key(3)), NotAttempted | ClaimsSuspended)
            assert len(records(valkey)) == 1
            permit(client, f"+{verb}")
            await until(lambda: store.not_ready_reason() is None)
            await claimed(store, key=key(2))
