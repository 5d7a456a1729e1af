"""The watch of one server; what it finds in a running service is in tests/e2e/test_store_losses.py."""

import asyncio

from proxy.store.link import Link
from proxy.store.record import PREFIX_BYTES
from proxy.store.server import load_scripts, opener
from proxy.store.watch import Membership, OverLink, Watch


async def nothing(_: object) -> None:
    """Prepare a connection for nothing in particular."""


async def test_two_looks_at_once_are_no_loss(own_valkey):
    """A server that claims wait at is looked at over two connections, which may come up together."""
    reported: list[str] = []
    member = Membership(
        bytes(PREFIX_BYTES), "one", "namespace=a", False, 60_000, 0, 60.0, True, lambda what, _: reported.append(what)
    )
    link = Link(opener(own_valkey.url, 5.0), nothing, 5.0)
    link.start()
    try:
        assert await link.wait_up(asyncio.get_running_loop().time() + 20)
        watch, talk = Watch(load_scripts(), member, {}), OverLink(link, 5.0)
        for _ in range(3):
            await asyncio.gather(*[watch.attend(talk, b"") for _ in range(5)])
    finally:
        await link.close()
    assert reported == ["founded"]
