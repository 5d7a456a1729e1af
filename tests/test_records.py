"""The view of operators on records, and marks from process to process, in either store."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from oncegate.store.record import ViewState
from oncegate.store.record_name import record_id, store_key
from oncegate.store.record_view import StoreError
from oncegate.store.store import Store
from tests.probes import Probe
from tests.stores import KEY, PATIENCE_S, RETENTION_MS, claimed, connected, key

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


async def test_a_key_that_an_operator_freed_is_shown(store: Store) -> None:
    """So is who freed it, and how long ago that name was written. Others are not known."""
    owner, operator = await claimed(store), store.token()
    await store.records.introduce(operator, "operator somebody", RETENTION_MS)
    await store.release_by_operator(KEY, owner.token, operator, owner.fence)
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
