"""The view of operators on records, and marks from process to process, in either store."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from oncegate.store.record import Claim, ViewState
from oncegate.store.record_name import record_id, store_key
from oncegate.store.record_view import Deciding, StoreError
from oncegate.store.redis.store import RedisStore
from oncegate.store.results import DropStatus
from oncegate.store.store import Store
from tests.probes import Probe
from tests.stores import KEY, PATIENCE_S, RETENTION_MS, TOMBSTONE_MS, answer, claimed, connected, key

# More than one page of a scan.
MANY = 700


@pytest.fixture
async def store(stored: Probe) -> AsyncIterator[Store]:
    async with connected(stored.url) as store:
        yield store


async def test_a_scan_goes_through_all_records(store: Store) -> None:
    """It finds every record page by page, or those alone whose ids begin alike. A key that was freed has none."""
    claims = await asyncio.gather(*[claimed(store, key=key(number)) for number in range(MANY)])
    await asyncio.gather(*[store.release(one, PATIENCE_S) for one in claims[::2]])
    there = {one.key for one in claims[1::2]}
    assert {record.key async for record in store.records.scan()} == there
    prefix = record_id(claims[1].key)[:2]
    found = {record.key async for record in store.records.scan(prefix)}
    assert found == {one for one in there if record_id(one).startswith(prefix)}
    assert claims[1].key in found
    assert [record async for record in store.records.scan(record_id(claims[0].key))] == []


async def test_what_a_look_is_for(store: Store) -> None:
    """Open keys, and responses past their retention, in whatever layout. In Redis nothing else is read."""
    number = iter(range(100))

    async def made(*chunks: bytes, **changes: Any) -> Claim:
        owner = replace(await claimed(store, key=key(next(number))), **changes)
        for at, chunk in enumerate(chunks[:-1]):
            await store.append(owner, at, chunk, PATIENCE_S)
        if chunks:
            await store.store(owner, answer(*chunks), chunks[-1], PATIENCE_S)
        return owner

    kept: dict[str, Any] = {"tombstone_ms": TOMBSTONE_MS}
    over = {**kept, "retention_ms": 1}
    due = [await made(), await made(b"small", **over), await made(b"in ", b"chunks", **over)]
    due.append(await made())
    await store.append(due[-1], 0, b"the first", PATIENCE_S)
    due.append(await made())
    await store.mark_unknown(due[-1], "lost", PATIENCE_S)
    for changes in ({}, kept):
        await made(b"small", **changes)
        await made(b"in ", b"chunks", **changes)
    dropped = await made(b"small", **over)
    await asyncio.sleep(0.01)
    view = await store.records.read(dropped.key)
    assert view is not None
    assert await store.drop(view) is DropStatus.DROPPED
    (server,) = store.records.servers
    found = {record.key async for record in server.scan_due(0.0)}
    wanted = {owner.key for owner in due}
    assert wanted <= found
    if isinstance(store, RedisStore):
        assert found == wanted


async def test_a_key_that_an_operator_freed_is_shown(store: Store) -> None:
    """So is who freed it, and how long ago that name was written. Others are not known."""
    owner, operator = await claimed(store), store.token()
    await store.records.introduce(operator, "operator somebody", RETENTION_MS)
    await store.release_by_operator(KEY, Deciding(owner.token), operator, owner.fence)
    record = await store.records.read(KEY)
    assert record is not None
    assert (record.state, record.token) == (ViewState.RELEASED, operator)
    assert [one.state async for one in store.records.scan()] == [ViewState.RELEASED]
    name, ago_ms = await store.records.proxy_of(operator)
    assert name == "operator somebody"
    assert ago_ms is not None
    assert 0 <= ago_ms < 60_000
    assert await store.records.proxy_of(b"nobody's token..") == ("unknown", None)


async def test_records_of_a_store_that_is_away(store: Store) -> None:
    """There is no view of them: whoever asks gets an error, and no empty list."""
    await store.close()
    with pytest.raises(StoreError):
        await store.records.read(KEY)
    with pytest.raises(StoreError):
        assert [one async for one in store.records.scan()]


async def test_a_mark_ends_by_itself(store: Store) -> None:
    """Until then it has the value that was written last."""
    name = store_key(KEY) + b":test"
    assert await store.marks.exists(name) is False
    assert await store.marks.get(name) == b""
    await store.marks.put(name, b"one", 60_000)
    await store.marks.put(name, b"two", 50)
    await asyncio.sleep(0.1)
    assert await store.marks.exists(name) is False
    await store.marks.put(name, b"three", 60_000)
    assert await store.marks.exists(name) is True
    assert await store.marks.get(name) == b"three"
    await store.close()
    assert await store.marks.exists(name) is None
    assert await store.marks.get(name) == b""


async def test_a_mark_is_swapped(store: Store) -> None:
    """From the value that it has, and from none; an empty value is none, and so is one whose time is over."""
    name, marks = store_key(KEY) + b":test", store.marks

    async def swap(before: bytes, after: bytes, lasts_ms: int = 60_000) -> bool | None:
        return await marks.swap(name, before, after, lasts_ms)

    assert await swap(b"one", b"two") is False
    assert await marks.get(name) == b""
    assert [await swap(b"", b"one"), await swap(b"", b"one")] == [True, False]
    assert [await swap(b"two", b"three"), await swap(b"one", b"\x00\xfftwo")] == [False, True]
    assert await marks.get(name) == b"\x00\xfftwo"
    assert [await swap(b"\x00\xfftwo", b""), await swap(b"\x00\xfftwo", b"one")] == [True, False]
    assert await marks.exists(name) is False
    await marks.put(name, b"", 60_000)
    assert await swap(b"", b"one", 50) is True
    await asyncio.sleep(0.1)
    assert [await swap(b"one", b"two"), await swap(b"", b"three")] == [False, True]
    others = [store_key(key(number)) + b":test" for number in (2, 3, 4)]
    await marks.put(others[1], b"another", 60_000)
    assert await marks.get_all([*others, name]) == [b"", b"another", b"", b"three"]
    assert await marks.get_all([]) == []
    await store.close()
    assert await swap(b"three", b"four") is None
    assert await marks.get_all([name, name]) == [b"", b""]


@pytest.mark.parametrize("before", [b"", b"one"])
async def test_one_swap_of_many_wins(store: Store, stored: Probe, before: bytes) -> None:
    """Of swaps from the same value at once, by two processes, one alone is done, again and again."""
    async with connected(stored.url) as other:
        for number in range(20):
            name = store_key(key(number)) + b":test"
            if before:
                await store.marks.put(name, before, 60_000)
            values = [b"%d" % one for one in range(8)]
            swaps = [(store, other)[at % 2].marks.swap(name, before, one, 60_000) for at, one in enumerate(values)]
            done = await asyncio.gather(*swaps)
            assert sorted(done) == [False] * 7 + [True]  # type: ignore[type-var]
            assert await store.marks.get(name) == values[done.index(True)]


async def test_marks_that_a_crash_lost(own_store: Any) -> None:
    """A server that was killed has none of them, whatever it has of the records: who knows one does not win by it."""
    name = store_key(KEY) + b":test"
    async with connected(own_store.url, timeout_ms=1000) as store:
        assert await store.marks.swap(name, b"", b"one", 600_000) is True
        own_store.kill()
        assert await store.marks.swap(name, b"one", b"two", 600_000) is None
        await asyncio.to_thread(own_store.start)
        assert await store.wait_up(PATIENCE_S)
        done: bool | None = None
        async with asyncio.timeout(PATIENCE_S):
            while (done := await store.marks.swap(name, b"one", b"two", 600_000)) is None:
                await asyncio.sleep(0.05)
        assert [done, await store.marks.swap(name, b"", b"three", 600_000)] == [False, True]
        assert await store.marks.get_all([name]) == [b"three"]
