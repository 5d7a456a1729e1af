"""Rules under which a request ends once nobody waits for its response: the API's connection is closed, and no retry
executes it."""

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.test_operate import Desk
from tests.parts import (
    CHUNKED,
    LAST_CHUNK,
    OK,
    Blackhole,
    Proxy,
    RawClient,
    RawUpstream,
    Received,
    ask,
    chunk,
    holding,
    read_answer,
    request,
    until,
)

GRACE_S = 0.5
RULES = f"""
[[rule]]
name = "llm"
path = "/v1/**"
on_unknown = "retry"
on_duplicate = "wait"
on_client_gone = "cancel"
cancel_grace_s = {GRACE_S}
"""
SSE = CHUNKED.replace(b"text/plain", b"text/event-stream")
LEAVING = {"FIN": RawClient.close, "RST": RawClient.reset, "half": lambda client: client.writer.write_eof()}


class Api:
    """An API that sends `begins`, and then waits until `ends` is set or its caller is gone (`gone`)."""

    def __init__(self) -> None:
        self.begins: list[bytes] = []
        self.ends, self.gone = asyncio.Event(), asyncio.Event()

    async def script(
        self, _: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, __: Received
    ) -> None:
        for piece in self.begins:
            writer.write(piece)
        leaving, ending = asyncio.ensure_future(reader.read(1)), asyncio.ensure_future(self.ends.wait())
        await asyncio.wait([leaving, ending], return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if leaving.done():
            self.gone.set()
            raise ConnectionError
        leaving.cancel()
        await asyncio.wait([leaving])
        writer.write(LAST_CHUNK if self.begins else OK)


@pytest.fixture
def api(upstream) -> Api:
    api = Api()
    upstream.script = api.script
    return api


@pytest.fixture
def gates(proxies, upstream, valkey, tmp_path: Path):
    (tmp_path / "rules.toml").write_text(RULES)
    return lambda: proxies(upstream, valkey.url, RULES_FILE="rules.toml", LEASE_MS=3000)


async def sent(gate: Proxy, upstream: RawUpstream, key: str, target: str = "/v1/chat") -> RawClient:
    """Return a client whose request has reached the API."""
    before = len(upstream.received)
    client = await RawClient.open(gate.port)
    client.writer.write(request(target=target, key=key))
    await until(lambda: len(upstream.received) > before)
    return client


def logged(gate: Proxy) -> list[dict]:
    return [line for line in gate.events("request") if line["outcome"] == "cancelled"]


@pytest.mark.fault(63)
async def test_a_request_ends_with_its_last_reader(gates, upstream, valkey, tmp_path):
    """A client that leaves in any way, before the head or in the stream, ends its request after the grace. No retry
    executes it, though the mode is `retry`: the client stopped it."""
    gate = gates()
    moments = [("FIN", []), ("RST", [SSE, chunk(b"data: 1\n\n")]), ("half", [SSE])]
    for number, (how, begins) in enumerate(moments, 1):
        api, key, began = Api(), f"stopped-{how}", asyncio.get_running_loop().time()
        api.begins, upstream.script = begins, api.script
        client = await sent(gate, upstream, key)
        LEAVING[how](client)
        await asyncio.wait_for(api.gone.wait(), 20)
        assert asyncio.get_running_loop().time() - began > GRACE_S
        await until(lambda count=number: gate.metric('settled_total{settlement="cancelled"}') == count)
        assert gate.metric('requests_total{outcome="cancelled"}') == number
        await until(lambda count=number: len(logged(gate)) == count)
        assert logged(gate)[-1]["client_gone"]
        retry = await ask(gate.port, request(target="/v1/chat", key=key))
        assert (retry.status, retry.slug, retry.problem["reason"]) == (409, "outcome-unknown", "cancelled")
        assert retry.header("x-should-retry") == b"false"
        assert retry.problem.get("original_status") == (200 if begins else None)
        assert len(upstream.received) == number
        client.close()
    shown = (await Desk(valkey.url, tmp_path).listed())[0]
    assert (shown["state"], shown["mode"]) == ("unknown", "cancelled")
    assert shown["reason"].startswith("cancelled: its last reader left; ")


@pytest.mark.fault(63)
@pytest.mark.parametrize("where", ["the same process", "another replica"])
async def test_a_duplicate_that_waits_is_a_reader(gates, upstream, api, where):
    """The response is finished for a duplicate that waits, in any process; without it the grace begins anew."""
    gate = gates()
    other = gate if where == "the same process" else gates()
    waiting = request(target="/v1/chat", key="read")
    client = await sent(gate, upstream, "read")
    duplicate = await RawClient.open(other.port)
    duplicate.writer.write(waiting)
    await until(lambda: other.metric("waiting") == 1)
    client.close()
    await asyncio.sleep(2 * GRACE_S + 0.6)
    assert not api.gone.is_set()
    duplicate.reset()
    left = asyncio.get_running_loop().time()
    await asyncio.wait_for(api.gone.wait(), 20)
    assert asyncio.get_running_loop().time() - left > GRACE_S / 2
    assert (await ask(other.port, waiting)).problem["reason"] == "cancelled"
    assert len(upstream.received) == 1


async def test_a_response_that_ends_within_the_grace_is_stored(gates, upstream, api):
    """Within the grace nothing is lost: the retry gets the whole response of the one execution."""
    gate = gates()
    api.begins = [SSE, chunk(b"data: 1\n\n")]
    client = await sent(gate, upstream, "back")
    client.close()
    api.ends.set()
    answer = await ask(gate.port, request(target="/v1/chat", key="back"))
    assert (answer.header("oncegate-status"), answer.body) == (b"replayed", b"data: 1\n\n")
    assert len(upstream.received) == 1


async def test_a_request_without_a_key_ends_with_its_client(gates, upstream, api):
    """Nobody can come back for its response, so there is no grace. Requests of other rules are finished."""
    gate = gates()
    client = await RawClient.open(gate.port)
    client.writer.write(request(target="/v1/chat", key=None))
    await until(lambda: upstream.received)
    began = asyncio.get_running_loop().time()
    client.close()
    await asyncio.wait_for(api.gone.wait(), 20)
    assert asyncio.get_running_loop().time() - began < GRACE_S
    await until(lambda: gate.metric('requests_total{outcome="cancelled"}') == 1)
    api.gone.clear()
    client = await sent(gate, upstream, "finished", "/other")
    client.close()
    await asyncio.sleep(2 * GRACE_S)
    assert not api.gone.is_set()
    api.ends.set()
    await until(lambda: gate.metric('settled_total{settlement="stored"}') == 1)


@pytest.mark.fault(35, 63)
async def test_a_store_that_does_not_answer_ends_nothing(proxies, upstream, api, own_valkey, tmp_path):
    """Nobody can say then who waits in another process, so the request goes on; it ends when the store is back."""
    (tmp_path / "rules.toml").write_text(RULES)
    gate = proxies(upstream, own_valkey.url, RULES_FILE="rules.toml")
    client = await sent(gate, upstream, "paused")
    own_valkey.pause()
    client.close()
    await asyncio.sleep(GRACE_S + 1.2)
    assert not api.gone.is_set()
    own_valkey.resume()
    await asyncio.wait_for(api.gone.wait(), 10)
    await until(lambda: gate.metric('settled_total{settlement="cancelled"}') == 1)


@pytest.mark.fault(64)
async def test_a_cancel_before_the_request_is_sent_holds_it_back(proxies, upstream, valkey, tmp_path):
    """While a connection is made it ends at once, and while the request waits for one it never leaves. No retry
    executes it: its client stopped it before, and would be surprised."""
    busy, hole = asyncio.Event(), Blackhole()
    (tmp_path / "rules.toml").write_text(f"""
[[upstream]]
name = "one"
url = "{upstream.url}"
max_connections = 1

[[upstream]]
name = "hole"
url = "{hole.url}"

[[rule]]
name = "one"
path = "/one/**"
upstream = "one"
on_unknown = "retry"
on_client_gone = "cancel"
cancel_grace_s = 0

[[rule]]
name = "hole"
path = "/hole"
upstream = "hole"
on_unknown = "retry"
on_client_gone = "cancel"
cancel_grace_s = 0
""")
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml", CONNECT_TIMEOUT_S=600)
    upstream.script = holding(busy)
    first = await sent(gate, upstream, "first", "/one/a")
    for number, target in enumerate(("/one/b", "/hole"), 1):
        client = await RawClient.open(gate.port)
        client.writer.write(request(target=target, key=target))
        await until(lambda: gate.metric("in_flight") == 2)
        client.close()
        await until(lambda count=number: gate.metric('settled_total{settlement="cancelled"}') == count)
        retry = await ask(gate.port, request(target=target, key=target))
        assert (retry.slug, retry.problem["reason"]) == ("outcome-unknown", "cancelled")
    busy.set()
    assert (await read_answer(first.reader)).status == 200
    assert (await ask(gate.port, request(target="/one/c", key="third"))).status == 200
    assert [one.line.split()[1] for one in upstream.received] == [b"/one/a", b"/one/c"]
    first.close()
    hole.close()


@pytest.mark.fault(65)
async def test_a_cancel_between_two_sendings_holds_the_second_back(proxies, upstream, valkey, tmp_path):
    """A lost request is sent again, to an API that executes a key once; not after its client has left."""
    (tmp_path / "rules.toml").write_text("""
[[rule]]
name = "again"
path = "/again"
upstream_idempotent = true
on_client_gone = "cancel"
cancel_grace_s = 0
""")
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml", UPSTREAM_REST_S=0)

    lost, together = asyncio.Event(), asyncio.Barrier(2)

    async def lose(
        _: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Received
    ) -> None:
        if b"/again" not in received.line:
            await together.wait()
            writer.write(OK)
            return
        writer.write_eof()
        with suppress(ConnectionError):
            await reader.read()
        lost.set()

    upstream.script = lose
    # Between two sendings is a pause of random length: the cancel may come behind it, but not every time.
    for number in range(1, 11):
        # Two connections are idle then: one to be lost, and one at hand for the second sending.
        warm = [request(target="/warm", key=f"{number}-{which}") for which in "ab"]
        await asyncio.gather(*[ask(gate.port, one) for one in warm])
        lost.clear()
        before = len(upstream.received)
        client = await sent(gate, upstream, f"lost-{number}", "/again")
        await asyncio.wait_for(lost.wait(), 10)
        client.close()
        await until(lambda count=number: gate.metric('settled_total{settlement="cancelled"}') == count)
        if len(upstream.received) == before + 1:
            return
    raise AssertionError("each request was sent once more")
