"""The pages of a running proxy: a complaint, found and settled in a browser, with the embedded store."""

import re
from html import unescape

import pytest
from aiohttp import ClientSession, CookieJar

from tests.admin_parts import OPERATE, tokens_file
from tests.parts import Proxy, answering, ask, request, until

RULES = """
[[rule]]
name = "charges"
path = "/v1/charges"
note = "header:X-Order-Id"

[[rule]]
name = "orders"
path = "/v1/orders"
note = "header:X-Order-Id"
[rule.reconcile]
url = "/v1/of/{note}"
reference = { "/order" = "{note}" }
succeeded = [{ status = "200" }]
first_after_s = 600
most_s = 600
"""
FOUND = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 22\r\n\r\n{"order":"order-4711"}'
BAD = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n"
HEAD = ("Authorization: Bearer s3cret-token", "X-Order-Id: order-4711")


class Seat:
    """A browser of an operator, without scripts."""

    def __init__(self, session: ClientSession, gate: Proxy) -> None:
        self._session, self._base, self.page, self.path = session, f"http://localhost:{gate.admin_port}", "", ""

    async def get(self, path: str) -> str:
        async with self._session.get(f"{self._base}{path}") as response:
            self.page, self.path = await response.text(), response.url.path
            assert response.status == 200, self.page
        return self.page

    async def post(self, path: str, *fields: tuple[str, str]) -> str:
        """Send a form of the page at hand."""
        data = [("form_token", self.value("form_token")), *fields] if self.page else fields
        async with self._session.post(f"{self._base}{path}", data=data, headers={"Origin": self._base}) as response:
            self.page, self.path = await response.text(), response.url.path
            assert response.status == 200, self.page
        return self.page

    def value(self, name: str) -> str:
        found = re.search(rf'name="{name}" value="([^"]*)"', self.page)
        assert found, self.page
        return unescape(found[1])


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_complaint_is_found_and_settled(proxies, upstream, tmp_path, workers):
    """A client has a 409 for an order. An operator pastes its request, reads what happened, and gives the key its
    answer, which the client's retry gets. The API is not called again, and what was pasted is nowhere."""
    (tmp_path / "rules.toml").write_text(RULES)
    settings = {"ADMIN_TOKENS_FILE": tokens_file(tmp_path), "RULES_FILE": "rules.toml", "WORKERS": workers}
    gate = proxies(upstream, **settings)
    upstream.script = answering(BAD)
    raw = request("POST", "/v1/charges", "s3cret-key", b"{}", *HEAD)
    lost = await ask(gate.port, raw)
    assert (lost.status, lost.header("oncegate-status")) == (502, b"unknown")
    assert (await ask(gate.port, raw)).slug == "outcome-unknown"
    async with ClientSession(cookie_jar=CookieJar(unsafe=True)) as session:
        seat = Seat(session, gate)
        await seat.post("/login", ("token", OPERATE), ("next", "/"))
        assert "Decide 1 key" in seat.page
        await seat.get("/key")
        await seat.post("/key", ("pasted", raw.decode()))
        assert re.fullmatch("/key/[A-Za-z0-9_-]{32}", seat.path)
        for said in ("order-4711", "charges", "status 502 came", "the API said 502"):
            assert said in seat.page
        await seat.post("/review", ("key", seat.value("key")), ("action", "resolve"))
        answer = [("status", "201"), ("headers", "Content-Type: application/json"), ("body", '{"id": 9}')]
        await seat.post("/review", ("signed", seat.value("signed")), *answer)
        await seat.post("/decide", ("signed", seat.value("signed")))
        assert "1 key resolved" in seat.page
        retried = await ask(gate.port, raw)
        assert (retried.status, retried.body) == (201, b'{"id": 9}')
        assert retried.header("oncegate-status") == b"replayed"
        assert len(upstream.received) == 1
        await until(lambda: gate.events("audit"))
        line = gate.events("audit")[-1]
        assert {"action": "resolve", "outcome": "resolved", "user": "olga", "level": "warning"}.items() <= line.items()
        await seat.get("/")
        assert "Nothing waits for you" in seat.page
        # A page that is watched does not hold up the end.
        async with session.get(f"http://localhost:{gate.admin_port}/events") as stream:
            assert (await stream.content.readline()).startswith(b"retry: ")
            assert gate.stop() == 0
            await stream.read()
    assert "s3cret" not in gate.log()


async def test_the_api_is_asked_in_a_browser(proxies, upstream, tmp_path):
    """Whoever may decide lets oncegate ask the API about a key, from a form of the page alone. The client's retry gets
    what the API says. The log says who asked, and the sum of all workers has the key."""
    (tmp_path / "rules.toml").write_text(RULES)
    settings = {"ADMIN_TOKENS_FILE": tokens_file(tmp_path), "RULES_FILE": "rules.toml", "WORKERS": 2}
    gate = proxies(upstream, **settings)
    upstream.script = answering(BAD)
    raw = request("POST", "/v1/orders", "s3cret-key", b"{}", *HEAD)
    assert (await ask(gate.port, raw)).header("oncegate-status") == b"unknown"
    upstream.script = answering(FOUND)
    async with ClientSession(cookie_jar=CookieJar(unsafe=True)) as session:
        seat = Seat(session, gate)
        await seat.post("/login", ("token", OPERATE), ("next", "/"))
        await seat.get("/unknown")
        assert "not asked yet, next in" in seat.page
        [page] = re.findall('"(/key/[^"]{32})"', seat.page)
        await seat.get(page)
        forged = await session.post(f"http://localhost:{gate.admin_port}{page}/probe", data={"form_token": "0" * 64})
        assert forged.status == 403
        await seat.post(f"{page}/probe")
        assert "The API says: succeeded" in seat.page
        retried = await ask(gate.port, raw)
        assert (retried.body, retried.header("oncegate-status")) == (b'{"order":"order-4711"}', b"reconciled")
        await until(lambda: gate.events("audit"))
        [line] = gate.events("audit")
        assert {"action": "reconcile", "outcome": "resolved", "by": "operator", "user": "olga"}.items() <= line.items()
        await until(lambda: gate.metric('reconciled_total{by="operator"}') == 1)
        assert gate.metric('probes_total{rule="orders",verdict="succeeded"}') == 1
    assert "s3cret" not in gate.log()
