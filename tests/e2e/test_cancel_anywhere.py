"""`oncegate keys cancel`: the connection to the API closes on whichever replica has it, and no retry executes."""

import asyncio
import json
import signal

import pytest

from oncegate.operating import decisions
from tests.e2e.test_cancelling import SSE, Api
from tests.e2e.test_operate import Desk, audit
from tests.parts import LAST_CHUNK, RawClient, RawUpstream, ask, chunk, read_answer, request, until

RULES = """
[[rule]]
name = "llm"
path = "/v1/**"
on_unknown = "retry"
note = "header:x-order"
"""
ORDER = "X-Order: 1042"


@pytest.fixture
def api(upstream: RawUpstream) -> Api:
    api = Api()
    upstream.script = api.script
    return api


@pytest.fixture
def gates(fork, upstream, stored, tmp_path):
    (tmp_path / "rules.toml").write_text(RULES)
    return lambda **settings: fork(upstream, stored.url, RULES_FILE="rules.toml", **settings)


@pytest.fixture
def desk(stored, tmp_path) -> Desk:
    return Desk(stored.url, tmp_path, RULES_FILE="rules.toml")


def raw(key: str) -> bytes:
    return request("POST", "/v1/chat", key, b"x", ORDER)


async def begun(gate, upstream: RawUpstream, key: str = "stopped") -> RawClient:
    """Return a client whose request the API has, and has begun to answer if it does."""
    before = len(upstream.received)
    client = await RawClient.open(gate.port)
    client.writer.write(raw(key))
    await until(lambda: len(upstream.received) > before)
    return client


async def ends(client: RawClient) -> bool:
    """Return whether the response comes to a clean end; False: it is broken off."""
    try:
        await asyncio.wait_for(client.reader.readuntil(LAST_CHUNK), 20)
    except (asyncio.IncompleteReadError, ConnectionError):
        return False
    return True


async def test_a_person_stops_a_stream_on_another_replica(gates, upstream, api, desk):
    """The API's connection closes long before its owner looks at its lease. What its client got is broken off, and no
    retry executes, at either replica."""
    owner, other = await gates(), await gates()
    api.begins = [SSE, chunk(b"data: 1\n\n")]
    client = await begun(owner, upstream)
    await client.reader.readuntil(b"data: 1\n\n")
    told = await desk("cancel", "stopped", "--json")
    # A renewal comes after 10 s.
    await asyncio.wait_for(api.gone.wait(), 8)
    assert json.loads(told.stdout) == {"action": "cancel"} | {
        name: value for name, value in audit(told).items() if name in json.loads(told.stdout) and name != "action"
    }
    line = audit(told)
    assert (line["action"], line["outcome"], line["state_before"]) == ("cancel", "cancelled", "in_flight")
    assert not await ends(client)
    client.close()
    for gate in (owner, other):
        retry = await ask(gate.port, raw("stopped"))
        assert (retry.status, retry.slug, retry.problem["reason"]) == (409, "outcome-unknown", "cancelled")
        assert retry.header("x-should-retry") == b"false"
    assert len(upstream.received) == 1
    shown = await desk.show("stopped")
    assert (shown["state"], shown["mode"]) == ("unknown", "cancelled")
    assert shown["reason"] == f"cancelled: operator {line['user']} on {line['host']} stopped it; status 200 came"
    assert owner.metric('cancels_total{by="operator"}') == 1
    assert other.metric('cancels_total{by="operator"}') == 0


@pytest.mark.parametrize("stored", ["valkey"], indirect=True)
async def test_a_key_to_cancel_is_named_in_every_way(gates, upstream, api, desk, tmp_path):
    """By the key, an id or its beginning, a note, a request; and what is not in flight cannot be cancelled."""
    gate = await gates()
    (tmp_path / "headers").write_text("Idempotency-Key: named\n")
    ways = [
        lambda shown: ["named"],
        lambda shown: ["--id", shown["id"][:12]],
        lambda shown: ["--note", "1042"],
        lambda shown: ["--request", "POST /v1/chat", "--headers-file", "headers"],
    ]
    for number, way in enumerate(ways, 1):
        api.gone.clear()
        client = await begun(gate, upstream, "named")
        shown = await desk.show("named")
        assert "cancelled" in (await desk("cancel", *way(shown))).stdout
        assert (await read_answer(client.reader)).problem["reason"] == "cancelled"
        client.close()
        await asyncio.wait_for(api.gone.wait(), 8)
        assert (await desk("cancel", "named", code=1)).stderr == (
            "this key is unknown; only one in flight can be cancelled\n"
        )
        await desk("release", "named")
        assert "released" in (await desk("cancel", "named", code=1)).stderr
        assert gate.metric('cancels_total{by="operator"}') == number
    api.ends.set()
    assert (await ask(gate.port, raw("done"))).status == 200
    assert "complete" in (await desk("cancel", "done", code=1)).stderr
    assert "no record" in (await desk("cancel", "never", code=1)).stderr
    await desk("cancel", code=2)


@pytest.mark.fault(66)
@pytest.mark.parametrize("stored", ["valkey", "postgres"], indirect=True)
async def test_an_owner_that_died_hears_of_no_cancel(gates, upstream, api, desk, monkeypatch):
    """Nobody pretends that it was cancelled. Once its lease is over the key is unknown in the mode of its claim."""
    monkeypatch.setattr(decisions, "CANCEL_S", 0.5)
    owner, other = await gates(LEASE_MS=6000), await gates()
    client = await begun(owner, upstream)
    owner.kill()
    told = await desk("cancel", "stopped", code=1)
    assert "may be dead" in told.stderr
    assert audit(told)["outcome"] == "accepted"
    shown = {}
    while shown.get("state") != "unknown":
        shown = await desk.show("stopped")
    assert shown["mode"] == "retry"
    assert "unknown" in (await desk("cancel", "stopped", code=1)).stderr
    api.ends.set()
    retry = await ask(other.port, raw("stopped"))
    assert retry.header("oncegate-status") == b"executed"
    client.close()


@pytest.mark.fault(67)
@pytest.mark.parametrize("pause", ["while the note is posted", "while it is read"])
async def test_a_store_that_stands_still_within_a_cancel(fork, upstream, api, own_valkey, tmp_path, monkeypatch, pause):
    """A command that the store does not answer says so; a note that is there is found when the store is back."""
    monkeypatch.setattr(decisions, "CANCEL_S", 0.5)
    (tmp_path / "rules.toml").write_text(RULES)
    gate = await fork(upstream, own_valkey.url, RULES_FILE="rules.toml")
    desk = Desk(own_valkey.url, tmp_path, STORE_TIMEOUT_MS=300)
    client = await begun(gate, upstream)
    if pause == "while it is read":
        gate.signal(signal.SIGSTOP)
        assert "may be dead" in (await desk("cancel", "stopped", code=1)).stderr
        own_valkey.pause()
        gate.signal(signal.SIGCONT)
        await asyncio.sleep(0.5)
        assert not api.gone.is_set()
        own_valkey.resume()
    else:
        shown = await desk.show("stopped")
        own_valkey.pause()
        assert (await desk("cancel", "--id", shown["id"], code=1)).stderr
        assert not api.gone.is_set()
        own_valkey.resume()
        await desk("cancel", "stopped")
    await asyncio.wait_for(api.gone.wait(), 8)
    assert (await read_answer(client.reader)).problem["reason"] == "cancelled"
    client.close()


async def test_an_answer_that_is_complete_wins(gates, upstream, api, desk):
    """Whatever comes first: the key is complete and replayed, or cancelled, and nobody sees both."""
    gate = await gates()
    api.begins = [SSE, chunk(b"data: 1\n\n")]
    for number in range(6):
        api.ends.clear()
        key = f"race-{number}"
        client = await begun(gate, upstream, key)
        await client.reader.readuntil(b"data: 1\n\n")
        cancelling = asyncio.ensure_future(desk("cancel", key, code=None))
        await asyncio.sleep(0.02 * number)
        api.ends.set()
        told = await cancelling
        is_whole = await ends(client)
        retry = await ask(gate.port, raw(key))
        assert is_whole == (told.returncode == 1) == (retry.header("oncegate-status") == b"replayed"), told
        assert is_whole or retry.problem["reason"] == "cancelled"
        client.close()
    assert len(upstream.received) == 6


@pytest.mark.parametrize("stored", ["valkey"], indirect=True)
async def test_a_client_that_does_not_read_holds_no_cancel_up(gates, upstream, api, desk):
    """The key is settled at once, not after the time that a slow client has."""
    gate = await gates(CLIENT_STALL_S=600)
    api.begins = [SSE, *(chunk(b"x" * 65536) for _ in range(400))]
    client = await begun(gate, upstream)
    client.writer.transport.pause_reading()
    # Held for it, as much as there is room for.
    held = -1.0
    while held != (now := gate.metric("buffered_bytes")) or not now:
        held = now
        await asyncio.sleep(0.2)
    assert "cancelled" in (await desk("cancel", "stopped")).stdout
    client.reset()
