"""`oncegate keys cancel`: the connection to the API closes on whichever replica has it, and no retry executes."""

import asyncio
import json
import re
import signal

import pytest

from oncegate.operating import decisions
from tests.e2e.test_cancelling import SSE, Api
from tests.e2e.test_operate import Desk, audit
from tests.parts import LAST_CHUNK, RawClient, RawUpstream, Received, ask, chunk, read_answer, request, until

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
    owner, other = await gates(LEASE_MS=3000), await gates()
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


@pytest.mark.fault(66)
@pytest.mark.parametrize("stored", ["valkey"], indirect=True)
@pytest.mark.parametrize("fault", ["kill@cancel:1", "kill@cancelled:1", "raise@cancel:1"])
async def test_an_owner_that_fails_within_a_cancel(gates, upstream, api, desk, monkeypatch, fault):
    """One that dies has settled nothing, so its lease decides; one that goes on hears of it once more."""
    if fault.startswith("kill"):
        monkeypatch.setattr(decisions, "CANCEL_S", 1.0)
    owner = await gates(LEASE_MS=3000, FAULT=fault, TESTING=1)
    client = await begun(owner, upstream)
    told = await desk("cancel", "stopped", code=None)
    await asyncio.wait_for(api.gone.wait(), 8)
    assert owner.events("fault injected")
    if fault.startswith("raise"):
        assert "cancelled" in told.stdout
        assert owner.events("background task failed, restarting it")
        assert (await read_answer(client.reader)).problem["reason"] == "cancelled"
    else:
        assert (told.returncode, audit(told)["outcome"]) == (1, "accepted")
        shown = {}
        while shown.get("state") != "unknown":
            shown = await desk.show("stopped")
        assert (shown["mode"], shown["reason"]) == ("retry", "its owner stopped renewing its lease")
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


JOINED = """
[[rule]]
name = "joined"
path = "/v1/**"
on_unknown = "retry"
on_duplicate = "join"
on_client_gone = "cancel"
cancel_grace_s = 0.5
"""


@pytest.mark.parametrize(
    ("stored", "where"),
    [("valkey", "the same process"), ("valkey", "another replica"), ("postgres", "another replica")],
    indirect=["stored"],
)
async def test_a_follower_is_a_reader(fork, upstream, api, stored, desk, tmp_path, where):
    """A response goes on for who joined it, in any process. It ends with its last reader, or when somebody stops it:
    then its readers are broken off."""
    (tmp_path / "rules.toml").write_text(JOINED)
    gate = await fork(upstream, stored.url, RULES_FILE="rules.toml")
    other = gate if where == "the same process" else await fork(upstream, stored.url, RULES_FILE="rules.toml")
    api.begins = [SSE, chunk(b"data: 1\n\n")]
    for number, key in enumerate(("left", "stopped"), 1):
        api.gone.clear()
        client = await begun(gate, upstream, key)
        follower = await RawClient.open(other.port)
        follower.writer.write(raw(key))
        await follower.reader.readuntil(b"data: 1\n\n")
        client.close()
        if key == "left":
            # Longer than the grace, and a second look at who reads.
            await asyncio.sleep(1.8)
            assert not api.gone.is_set()
            follower.reset()
        else:
            assert "cancelled" in (await desk("cancel", key)).stdout
            assert not await ends(follower)
            follower.close()
        await asyncio.wait_for(api.gone.wait(), 20)
        await until(lambda count=number: gate.metric('settled_total{settlement="cancelled"}') == count)
        assert (await ask(other.port, raw(key))).problem["reason"] == "cancelled"
    assert len(upstream.received) == 2
    assert gate.metric('cancels_total{by="client_gone"}') == 1


@pytest.mark.parametrize("stored", ["valkey"], indirect=True)
async def test_who_has_the_address_may_come_back(fork, upstream, api, stored, tmp_path):
    """A request goes on once somebody came to its address, at any replica, also before its response begins."""
    rules = JOINED.replace('on_duplicate = "join"', "resumable = true")
    (tmp_path / "rules.toml").write_text(rules)
    settings = {"RULES_FILE": "rules.toml", "SECRET": "a secret that is long enough"}
    gate, other = await fork(upstream, stored.url, **settings), await fork(upstream, stored.url, **settings)
    client = await begun(gate, upstream)
    running = await ask(other.port, raw("stopped"))
    address = re.search(rb"<([^>]+)>", running.header("link"))[1].decode()
    reader = await RawClient.open(other.port)
    reader.writer.write(request("GET", address, None, b""))
    await asyncio.sleep(0.5)
    client.close()
    reader.reset()
    # Longer than the grace, and a second look at who reads.
    await asyncio.sleep(2)
    assert not api.gone.is_set()
    api.ends.set()
    await until(lambda: gate.metric('settled_total{settlement="stored"}') == 1)
    assert (await ask(other.port, request("GET", address, None, b""))).status == 200


CANCELLABLE = """
[[rule]]
name = "cancellable"
path = "/v1/**"
cancellable = true
"""


@pytest.mark.parametrize("stored", ["valkey", "postgres"], indirect=True)
async def test_a_reader_stops_a_young_stream_at_another_replica(fork, upstream, stored, tmp_path):
    """Under a rule that lets readers stop it, the mailbox is read from the first moment on."""
    (tmp_path / "rules.toml").write_text(CANCELLABLE)
    settings = {"RULES_FILE": "rules.toml", "SECRET": "a secret that is long enough"}
    owner, other = await fork(upstream, stored.url, **settings), await fork(upstream, stored.url, **settings)
    ticks, gone = [0], asyncio.Event()

    async def tick(_: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, __: Received) -> None:
        leaving = asyncio.ensure_future(reader.read(1))
        writer.write(SSE)
        while not leaving.done():
            ticks[0] += 1
            writer.write(chunk(b"data: tick\n\n"))
            await asyncio.wait([leaving], timeout=0.1)
        gone.set()
        raise ConnectionError

    upstream.script = tick
    for number in range(10):
        ticks[0] = 0
        gone.clear()
        client = await begun(owner, upstream, f"ticking-{number}")
        head = await client.reader.readuntil(b"\r\n\r\n")
        address = re.search(rb'<([^>]+)>; rel="cancel"', head)[1].decode()
        stopped = await ask(other.port, request("DELETE", address, None, b""))
        assert (stopped.status, json.loads(stopped.body)["outcome"]) == (202, "in_flight")
        before = ticks[0]
        await asyncio.wait_for(gone.wait(), 20)
        client.close()
        await until(lambda count=number: owner.metric('settled_total{settlement="cancelled"}') == count + 1)
        assert json.loads((await ask(other.port, request("DELETE", address, None, b""))).body)["reason"] == "cancelled"
        # Other requests are a second old before their owner looks. A busy machine may take so long for the first step.
        if before <= 4:
            assert ticks[0] - before <= 5
            return
    raise AssertionError("no request was stopped in time to tell")
