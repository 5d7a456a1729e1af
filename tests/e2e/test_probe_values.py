"""What a rule keeps to ask the API with: it lies with an open key alone. Its credentials follow SIGHUP."""

import asyncio
import json
from urllib.parse import unquote

import pytest

from oncegate.store.open_keys.listing import open_keys
from tests.e2e.test_reload import hang_up
from tests.parts import OK, RawClient, RawUpstream, Received, answering, ask, request
from tests.stores import connected

RULES = """
[[rule]]
name = "charges"
path = "/charges/*"
note = "/order/id"
[rule.reconcile]
url = "/find?a={key}&b={path:2}&c={/order/id}&d={header:X-Order}"
keep = ["key", "path:2", "/order/id", "header:X-Order"]
credentials_file = "CREDENTIALS"
reference = {}
succeeded = [{ status = "200" }]

[[rule]]
name = "carts"
path = "/carts"
"""
BODY = b'{"order": {"id": 75010}}'


async def test_values_lie_with_an_open_key_alone(fork, upstream, stored, tmp_path):
    """The first head of its kind, and those that are known by then. A complete record has none, and no log has any."""
    (tmp_path / "credentials").write_text("Authorization: Bearer s3cret\n")
    (tmp_path / "rules.toml").write_text(RULES.replace("CREDENTIALS", str(tmp_path / "credentials")))
    proxy = await fork(upstream, stored.url, RULES_FILE=str(tmp_path / "rules.toml"))
    client = await RawClient.open(proxy.port)
    upstream.script = answering(OK.replace(b"200 OK", b"504 Gateway Timeout"))
    for number in range(6):
        fields = (f"X-Order: order {number}", f"X-Request-Id: {number}")
        asked = request("POST", f"/charges/c%2F{number}", f"k-{number}", BODY, *fields)
        assert (await client.ask(asked)).status == 504
        assert (await client.ask(request("POST", "/carts", f"cart-{number}", BODY, *fields))).status == 504
    upstream.script = answering(OK)
    assert (await client.ask(request("POST", "/charges/c", "done", BODY))).status == 200
    client.close()
    async with connected(stored.url) as store:
        page = await open_keys(store.records, 100)
    found = {one.kept.rule: [] for one in page.records}
    for one in page.records:
        found[one.kept.rule].append(dict(one.kept.values))
    expected = [
        {"key": f"k-{number}", "path:2": f"c/{number}", "/order/id": "75010", "header:X-Order": f"order {number}"}
        for number in range(6)
    ]
    assert sorted(found["charges"], key=lambda one: one["key"]) == expected
    assert found["carts"] == [{}] * 6
    log = proxy.log()
    assert not [word for word in ("75010", "s3cret", "/find", "k-3") if word in log]


ASKING = """
[[rule]]
name = "charges"
path = "/charges"
[rule.reconcile]
url = "/find/{key}?reference={key}"
keep = ["key"]
credentials_file = "CREDENTIALS"
reference = { "/reference" = "{key}" }
succeeded = [{ status = "200", when = { "/state" = "paid" } }]
first_after_s = 0.1
[rule.reconcile.answers.succeeded]
status = 201
body = '{{"charge": "{answer:/id}", "of": "{key}"}}'
"""


async def losing(_: RawUpstream, __: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Received) -> None:
    """Execute and say nothing; to a question, say what became of it."""
    if not received.line.startswith(b"GET"):
        writer.close()
        return
    reference = unquote(received.line.split()[1].decode().partition("reference=")[2])
    body = json.dumps({"reference": reference, "state": "paid", "id": "ch_{key}"}).encode()
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    await writer.drain()


async def settle(proxy, upstream, key: str) -> bytes:
    """Lose the answer to a charge and wait for the true one; return the head of the question that was asked."""
    own = "Authorization: Bearer cl1ent", "Cookie: a=cl1ent"
    assert (await ask(proxy.port, request("POST", "/charges", key, b"{}", *own))).status == 502
    answer = await ask(proxy.port, request("POST", "/charges", key, b"{}", *own, "Prefer: wait=30"), 60)
    assert (answer.status, answer.header("oncegate-status")) == (201, b"reconciled")
    assert json.loads(answer.body) == {"charge": "ch_{key}", "of": key}
    asked = [one.head for one in upstream.received if one.line.startswith(b"GET")][-1]
    assert b"cl1ent" not in asked
    return asked


async def test_credentials_are_the_rule_s_own_and_follow_their_file(proxies, upstream, valkey, tmp_path):
    """A reload takes all files or none: a broken one changes no rule, and no line of the log repeats it."""
    credentials, rules = tmp_path / "credentials", tmp_path / "rules.toml"
    credentials.write_text("Authorization: Bearer s3cret\n")
    rules.write_text(ASKING.replace("CREDENTIALS", str(credentials)))
    upstream.script = losing
    proxy = proxies(upstream, valkey.url, RULES_FILE=rules)
    asked = await settle(proxy, upstream, "k-{key}-{}-%2e{note}")
    path = b"k-%7Bkey%7D-%7B%7D-%252e%7Bnote%7D"
    assert asked.startswith(b"GET /find/" + path + b"?reference=" + path + b" HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer s3cret\r\n" in asked + b"\r\n"

    rules.write_text(rules.read_text().replace('"charges"', '"renamed"'))
    for number, content in enumerate(("Authorization Bearer s3cret", "Content-Length: 7\n", None), 1):
        credentials.write_text(content) if content else credentials.unlink()
        (reason,) = (await hang_up(proxy, "reload refused, nothing changed", number))["reasons"]
        assert 'rule "renamed": reconcile: credentials_file ' in reason
    assert b"Authorization: Bearer s3cret\r\n" in await settle(proxy, upstream, "k-2") + b"\r\n"
    credentials.write_text("Authorization: Bearer s3cret-too\n")
    assert (await hang_up(proxy))["rules"] == ["renamed"]
    assert b"Authorization: Bearer s3cret-too\r\n" in await settle(proxy, upstream, "k-3") + b"\r\n"
    assert not [word for word in ("s3cret", "cl1ent", "/find") if word in proxy.log()]


@pytest.mark.parametrize("body", [b'{"order": {"id": "' + b"x" * 1000 + b'"}}', b"{", b""])
async def test_what_cannot_be_kept_stops_nothing(fork, upstream, valkey, tmp_path, body):
    """A request without the values, or with too much of them, is treated as any other."""
    (tmp_path / "credentials").write_text("A: b\n")
    (tmp_path / "rules.toml").write_text(RULES.replace("CREDENTIALS", str(tmp_path / "credentials")))
    upstream.script = answering(OK)
    proxy = await fork(upstream, valkey.url, RULES_FILE=str(tmp_path / "rules.toml"))
    for status in (b"executed", b"replayed"):
        answer = await ask(proxy.port, request("POST", "/charges/c", "k", body))
        assert (answer.status, answer.header("oncegate-status")) == (200, status)
