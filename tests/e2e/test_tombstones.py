"""A key that outlives its response: a retry after the retention, and the purge of a tenant."""

import json
import re
from datetime import UTC, datetime, timedelta

import pytest
from redis import Redis

from oncegate.adaptation.json_rpc import OWN_ERROR
from tests.e2e.test_operate import TOKEN, Desk
from tests.parts import answering, ask, request

MADE = b"HTTP/1.1 201 Created\r\nContent-Length: 9\r\n\r\nn0b0dy-el"
SECRET = b"n0b0dy-el"


@pytest.fixture
def client(valkey) -> Redis:
    with valkey.client() as client:
        yield client


def records(client: Redis) -> dict[bytes, dict[bytes, bytes]]:
    return {name: client.hgetall(name) for name in client.scan_iter("once:{*}") if client.type(name) == b"hash"}


def expire(client: Redis) -> None:
    """Let the retention of every complete record be over."""
    for name, fields in records(client).items():
        if b"until" in fields:
            client.hset(name, "until", 1)


async def test_a_key_outlives_its_response(fork, upstream, probe, tmp_path):
    """After the retention a retry gets 410 with the status and time of the original, until the tombstone ends."""
    gate = await fork(upstream, probe.url, TOMBSTONE_S=60, RETENTION_S=90)
    upstream.script = answering(MADE)
    raw = request("POST", "/v1/charges", "order-1", b"{}")
    assert (await ask(gate.port, raw)).status == 201
    [key] = probe.keys()
    assert 140_000 < probe.left_ms(key) <= 150_000
    assert 80_000 < int(probe.fields(key)["until"]) - probe.now_ms() <= 90_000
    assert (await ask(gate.port, raw)).header("oncegate-status") == b"replayed"
    probe.change(key, until=1)
    again = await ask(gate.port, raw)
    assert (again.status, again.slug, again.header("oncegate-status")) == (410, "key-expired", b"refused")
    assert again.header("x-should-retry") == b"false"
    problem = again.problem
    assert (problem["original_status"], problem["retryable"], problem["reuse_key"]) == (201, False, False)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", problem["executed_at"])
    executed = datetime.fromisoformat(problem["executed_at"])
    assert timedelta() <= datetime.now(UTC) - executed < timedelta(seconds=60)
    other = await ask(gate.port, request("POST", "/v1/charges", "order-1", b"other"))
    assert other.slug == "key-reused"
    desk = Desk(probe.url, tmp_path)
    shown = await desk.show("order-1")
    assert (shown["state"], shown["status"]) == ("expired", 201)
    assert [one["id"] for one in await desk.listed("--state", "expired")] == [shown["id"]]
    for verb in (("resolve", "order-1", "--status", "200"), ("release", "order-1")):
        assert "expired" in (await desk(*verb, code=1)).stderr
    assert len(upstream.received) == 1
    assert gate.metric('requests_total{outcome="key_expired"}') == 1
    assert gate.metric('duplicates_suppressed_total{outcome="key_expired"}') == 1
    probe.remove(key)
    assert (await ask(gate.port, raw)).header("oncegate-status") == b"executed"


RULES = """
[[rule]]
name = "form"
path = "/form"
key = "derived:5"
[[rule]]
name = "none"
path = "/none"
tombstone_s = 0
[[rule]]
name = "tools"
path = "/mcp"
preset = "mcp"
"""


async def test_rules_about_tombstones(fork, upstream, valkey, client, tmp_path):
    """A derived key has none, and a rule may say so. A client of JSON-RPC gets its error, with the problem as data."""
    (tmp_path / "rules.toml").write_text(RULES)
    gate = await fork(upstream, valkey.url, TOMBSTONE_S=60, RULES_FILE=tmp_path / "rules.toml")
    for target, key, kept in (("/form", None, False), ("/none", "a", False), ("/else", "b", True)):
        client.flushall()
        raw = request("POST", target, key, b"{}")
        assert (await ask(gate.port, raw)).header("oncegate-status") == b"executed"
        [(name, fields)] = records(client).items()
        assert (b"until" in fields, client.pttl(name) > 86_400_000) == (kept, kept)
    done = b'{"jsonrpc":"2.0","id":7,"result":{}}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    upstream.script = answering(head % len(done) + done)
    call = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "pay", "arguments": {}}}
    raw = request("POST", "/mcp", "call-1", json.dumps(call).encode(), "Content-Type: application/json")
    assert (await ask(gate.port, raw)).header("oncegate-status") == b"executed"
    expire(client)
    again = await ask(gate.port, raw)
    error = json.loads(again.body)["error"]
    assert (again.status, error["code"], error["data"]["status"]) == (200, OWN_ERROR, 410)
    assert error["data"]["type"].endswith("key-expired")


async def test_a_tenant_is_purged(fork, upstream, probe, tmp_path):
    """No response of the tenant is left; its keys stay refused as long as they were to be, the others' are replayed."""
    gate = await fork(upstream, probe.url, TOMBSTONE_S=0)
    desk = Desk(probe.url, tmp_path)
    upstream.script = answering(MADE)
    mine = [request("POST", "/v1/charges", f"order-{n}", b"{}", TOKEN) for n in range(3)]
    other = request("POST", "/v1/charges", "order-0", b"{}", "Authorization: Bearer other")
    for raw in (*mine, other):
        assert (await ask(gate.port, raw)).status == 201
    tenants = [one["scope"] for one in await desk.listed("--state", "complete")]
    [theirs] = [scope for scope in tenants if tenants.count(scope) == 1]
    keys = probe.keys()
    before = {key: probe.left_ms(key) for key in keys}
    told = await desk("purge", "--credential", "--yes", stdin=TOKEN + "\n")
    assert told.stdout == "3 responses dropped\n"
    [line] = [json.loads(line) for line in told.stderr.splitlines()]
    assert (line["action"], line["dropped"], line["in_flight"], line["unconfirmed"]) == ("purge", 3, 0, 0)
    left = {key: probe.fields(key) for key in keys}
    assert sum("meta" in fields and SECRET in b"".join(fields.values()) for fields in left.values()) == 1
    assert all(0 < before[key] - probe.left_ms(key) + 1 < 60_000 for key in left)
    for raw in mine:
        assert (await ask(gate.port, raw)).slug == "key-expired"
    assert (await ask(gate.port, other)).header("oncegate-status") == b"replayed"
    assert len(upstream.received) == 4
    assert (await desk("purge", "--tenant", theirs, "--yes")).stdout == "1 responses dropped\n"
    assert (await ask(gate.port, other)).slug == "key-expired"
    assert (await desk("purge", "--tenant", theirs, "--yes")).stdout == "0 responses dropped\n"
