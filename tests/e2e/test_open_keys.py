"""Keys of proxies that were killed are known: their claims stood in the index before anything else was written."""

import asyncio

import pytest

from oncegate.store.open_keys.listing import open_counts, open_keys
from oncegate.store.record_name import record_id
from oncegate.store.record_view import OpenKind
from oncegate.store.unknown_keys import UnknownKeys
from tests.parts import OK, answering, ask, request
from tests.stores import connected

LEASE_MS = 600


@pytest.mark.parametrize("point", ["claimed", "sent"])
async def test_a_proxy_that_is_killed_before_its_first_renewal(fork, upstream, store, point):
    """SIGKILL right after the claim, and after the request was sent: the key is in flight, and one lease later lapsed.

    The next count of any replica has it; it is the first of the list; nothing but the claim was ever written.
    """
    upstream.script = answering(OK)
    doomed = await fork(upstream, store.url, LEASE_MS=LEASE_MS, FAULT=f"kill@{point}:1", TESTING=1)
    with pytest.raises((ConnectionError, AssertionError), match=r"ended|reset|closed|Connect"):
        await ask(doomed.port, request(key="k"))
    async with connected(store.url) as view:
        for server in view.records.servers:
            await server.index.begin()
            await server.index.note_complete()
        replica = UnknownKeys(view, 3_600_000, 36_000_000, lambda *_, **__: None)
        async with asyncio.timeout(10):
            while not (await open_counts(view.records))[OpenKind.LAPSED].keys:
                await asyncio.sleep(0.05)
        await replica.recount()
        assert {kind.value: count.keys for kind, count in replica.counts.items()} == {
            **dict.fromkeys((kind.value for kind in OpenKind), 0),
            "lapsed": 1,
        }
        assert replica.count == 1
        (found,) = (await open_keys(view.records, 10)).records
        assert found.open_kind is OpenKind.LAPSED
        assert len(record_id(found.key)) == 32
