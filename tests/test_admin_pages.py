"""The admin listener: which routes are open, what a page carries, and who sees one without a role."""

import re
from collections.abc import AsyncIterator

import pytest

from oncegate.admin.parts import at_once
from oncegate.admin.serving import serve_admin
from tests.admin_parts import admin_parts
from tests.parts import ask, request


@pytest.fixture
async def port() -> AsyncIterator[int]:
    listener = await serve_admin(admin_parts(notices=at_once(lambda: ["<b>other rules</b>"])))
    yield listener.address.port
    await listener.close()


def get(path: str, *fields: str, host: str = "localhost:8081") -> bytes:
    return request("GET", path, None, b"", *fields, host=host)


@pytest.mark.parametrize("host", ["localhost", "localhost:8081", "127.0.0.1:8081", "[::1]:8081", "LOCALHOST"])
async def test_a_page_on_the_machine_itself(port: int, host: str) -> None:
    """Whoever asks from a loopback address, by a name of the machine, sees a page; its values are escaped."""
    answer = await ask(port, get("/", host=host))
    assert answer.status == 200
    assert b"<li>&lt;b&gt;other rules&lt;/b&gt;</li>" in answer.body


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/static/oncegate.css"])
async def test_open_routes(port: int, path: str) -> None:
    """Probes, scrapes and the pages' own files ask under any name."""
    assert (await ask(port, get(path, host="10.0.0.7:8081"))).status == 200


async def test_a_page_loads_what_is_there(port: int) -> None:
    """Each file of a page is in the package, and each response has the fields that protect a page."""
    page = await ask(port, get("/"))
    for path in re.findall(r'(?:href|src)="(/static/[^"]+)"', page.body.decode()):
        assert (await ask(port, get(path))).status == 200
    assert page.header("cache-control") == b"no-store"
    assert b"frame-ancestors 'none'" in (page.header("content-security-policy") or b"")
    assert page.header("server") == b"oncegate"
    assert re.search(rb"<style|<script(?![^>]*src=)| style=| on\w+=", page.body) is None
