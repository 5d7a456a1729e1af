"""Whose key it is: tenants do not meet, and what is secret is found nowhere."""

import asyncio
import re
import signal

import pytest

from oncegate.commands import init
from tests.parts import CHUNKED, LAST_CHUNK, Received, Tap, ask, chunk, holding, request, until

ALICE, BOB = "Authorization: Bearer alice", "Authorization: Bearer bob"


def whose(tenant: str, body: bytes = b'{"amount": 1}', key: str = "key-1") -> bytes:
    return request("POST", "/v1/charges", key, body, *([tenant] if tenant else []))


async def echo_tenant(_, __, writer: asyncio.StreamWriter, received: Received) -> None:
    """Answer with the credentials that came."""
    names = ("authorization", "x-api-key", "cookie")
    text = b"|".join(value for name in names for value in received.header(name)) or b"nobody"
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))


TENANTS = [
    ALICE,
    BOB,
    "Authorization: bearer alice",
    "X-Api-Key: alice",
    "X-Api-Key: Bearer alice",
    "Authorization: Bearer alice\r\nX-Api-Key: alice",
    "Authorization: Bearer bob\r\nX-Api-Key: alice",
    "Cookie: session=alice",
    "Cookie: session=bob",
    "Api-Key: alice",
    "X-Goog-Api-Key: alice",
    "Authorization: Bearer alice\r\nStripe-Account: acct_1",
    "Authorization: Bearer alice\r\nStripe-Account: acct_2",
    "",
]


async def test_one_key_of_many_tenants_is_many_keys(gate, upstream, valkey):
    """Each credential has its own execution and its own replay under the same key; without one there is one more."""
    upstream.script = echo_tenant
    firsts = [await ask(gate.port, whose(tenant)) for tenant in TENANTS]
    assert [answer.header("oncegate-status") for answer in firsts] == [b"executed"] * len(TENANTS)
    for tenant, first in zip(TENANTS, firsts, strict=True):
        again = await ask(gate.port, whose(tenant))
        assert (again.header("oncegate-status"), again.body) == (b"replayed", first.body), tenant
    assert len(upstream.received) == len(valkey.records()) == len(TENANTS)
    assert gate.metric("without_credential_total") == 2
    await until(lambda: len(gate.events("requests without a credential")) == 1)


async def test_who_has_no_credential_is_reported_once_a_rule(proxies, upstream, valkey, tmp_path):
    """The first guarded request of a rule without any credential leaves a line, further ones are counted alone."""
    (tmp_path / "rules.toml").write_text(
        '[[rule]]\nname = "open"\npath = "/open"\n[[rule]]\nname = "events"\npath = "/events"\nscope = []\n'
    )
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml")
    for path in ("/open", "/open", "/v1", "/events", "/open"):
        assert (await ask(gate.port, request("POST", path, path, b"1"))).status == 200
    await until(lambda: gate.metric("without_credential_total") == 4)
    lines = gate.events("requests without a credential")
    assert [(line["rule"], line["level"]) for line in lines] == [("open", "warning"), ("", "warning")]
    gate.signal(signal.SIGHUP)
    await until(lambda: gate.events("reloaded"))
    assert (await ask(gate.port, request("POST", "/open", "/open", b"1"))).status == 200
    await until(lambda: len(gate.events("requests without a credential")) == 3)


async def test_a_cookie_counts_only_without_a_credential(gate, upstream):
    """Beside a scope header a cookie is no part of the tenant: it changes by itself."""
    upstream.script = echo_tenant
    first = await ask(gate.port, whose(f"{ALICE}\r\nCookie: visits=1"))
    again = await ask(gate.port, whose(f"{ALICE}\r\nCookie: visits=2"))
    assert again.header("oncegate-status") == b"replayed"
    assert again.body == first.body
    other = await ask(gate.port, whose("Cookie: visits=2"))
    assert other.header("oncegate-status") == b"executed"


async def test_another_tenants_request_shows_in_nothing(gate, upstream):
    """What is in flight, complete, or a mismatch for one tenant is none of these for another."""
    done = asyncio.Event()
    upstream.script = holding(done)
    alice = asyncio.ensure_future(ask(gate.port, whose(ALICE, b"1")))
    await until(lambda: upstream.received)
    assert (await ask(gate.port, whose(ALICE, b"1"))).slug == "in-flight"
    assert (await ask(gate.port, whose(ALICE, b"2"))).slug == "key-reused"
    upstream.script = echo_tenant
    for body in (b"2", b"1"):  # neither waits for alice's, nor is compared with it
        bob = await ask(gate.port, whose(BOB, body, key="key-1" if body == b"2" else "key-2"))
        assert (bob.header("oncegate-status"), bob.body) == (b"executed", b"Bearer bob")
    done.set()
    assert (await alice).body == b"ok"
    assert (await ask(gate.port, whose(BOB, b"2"))).body == b"Bearer bob"
    assert (await ask(gate.port, whose(BOB, b"1"))).slug == "key-reused"
    assert (await ask(gate.port, whose(ALICE, b"1"))).body == b"ok"
    assert len(upstream.received) == 3


# What each SDK sends of its user, and a prompt of it.
AZURE = ("/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21", "api-key: {user}")
GEMINI = ("/v1beta/models/gemini-2.5-flash:generateContent", "x-goog-api-key: {user}")
PROJECT = ("/v1/chat/completions", "Authorization: Bearer sk-1\r\nOpenAI-Project: {user}")


@pytest.mark.parametrize("key", ["key-1", None], ids=["with a key", "without"])
@pytest.mark.parametrize(("path", "credential"), [AZURE, GEMINI, PROJECT], ids=["azure", "gemini", "project"])
async def test_two_users_of_an_llm_get_their_own_answers(proxies, upstream, valkey, tmp_path, path, credential, key):
    """Under the preset `openai` one prompt of two users is two calls, whatever header tells the users apart."""
    (tmp_path / "rules.toml").write_text('[[rule]]\nname = "llm"\npreset = "openai"\n')
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml")
    said = []
    for user, count in (("alice", 0), ("bob", 0), ("alice", 1), ("bob", 1)):
        lines = (credential.format(user=user), f"x-stainless-retry-count: {count}")
        said.append((await ask(gate.port, request("POST", path, key, b"why?", *lines))).header("oncegate-status"))
    assert said == [b"executed", b"executed", b"replayed", b"replayed"]
    assert gate.metric("without_credential_total") == 0


async def test_one_cookie_may_be_the_tenant(proxies, upstream, valkey, tmp_path):
    """With `cookie:session` as scope, other cookies change without a second execution, and sessions do not meet."""
    (tmp_path / "rules.toml").write_text('[[rule]]\nname = "site"\nscope = ["known", "cookie:session"]\n')
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml")
    said = [
        (await ask(gate.port, whose(f"Cookie: {cookies}"))).header("oncegate-status")
        for cookies in ("_ga=1; session=a", "session=a; _ga=2; flash=x", "_ga=1; session=b", "_ga=1; session=a")
    ]
    assert said == [b"executed", b"replayed", b"executed", b"replayed"]


@pytest.mark.parametrize(("path", "form"), [("/checkout", b"item=7&token=4711"), ("/orders", b"item=7")])
async def test_a_form_is_sent_once_while_other_cookies_change(proxies, upstream, valkey, tmp_path, path, form):
    """With the rules that `oncegate init double-click` writes: a token needs no scope, a session's cookie is one."""
    (tmp_path / "rules.toml").write_bytes(init.example("double-click", "rules.toml"))
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml")
    kind = "Content-Type: application/x-www-form-urlencoded"
    for visits in (1, 2):
        cookies = f"Cookie: _ga=GA1.{visits}; session=a; flash=v{visits}"
        answer = await ask(gate.port, request("POST", path, None, form, kind, cookies))
        assert answer.header("oncegate-status") == (b"executed" if visits == 1 else b"replayed")
    other = await ask(gate.port, request("POST", "/orders", None, b"item=7", kind, "Cookie: session=b"))
    assert other.header("oncegate-status") == b"executed"
    assert gate.metric("without_credential_total") == 0


async def test_a_scheme_is_refused_until_it_is_named(proxies, upstream, valkey, tmp_path):
    """A scheme that oncegate does not know is a scope once the settings or the rule name it."""
    (tmp_path / "rules.toml").write_text(
        '[[rule]]\nname = "bare"\npath = "/bare"\nstable_schemes = ["bare"]\n[[rule]]\nname = "other"\npath = "/o"\n'
    )
    gate = proxies(upstream, valkey.url, RULES_FILE="rules.toml", STABLE_SCHEMES="DPoP")
    told = {
        (path, value): (await ask(gate.port, request("POST", path, path, b"1", f"Authorization: {value}"))).status
        for path in ("/v1", "/o", "/bare")
        for value in ("DPoP abc", "sk_live_1", "Negotiate abc")
    }
    fine = {("/v1", "DPoP abc"), ("/o", "DPoP abc"), ("/bare", "sk_live_1")}
    assert told == {asked: 200 if asked in fine else 400 for asked in told}


@pytest.mark.parametrize(
    "credential",
    [
        "AWS4-HMAC-SHA256 Credential=a",
        "Digest username=a",
        "OAuth oauth_nonce=1",
        "Signature keyId=a",
        "hawk id=a",
        "NTLM TlRM",
    ],
)
async def test_a_credential_made_for_each_request_is_refused(gate, upstream, valkey, credential):
    """Such a scheme would make each retry another tenant's, so a guarded request with it is refused; others pass."""
    answer = await ask(gate.port, whose(f"Authorization: {credential}"))
    assert (answer.status, answer.slug) == (400, "scope-unstable")
    assert answer.header("oncegate-status") == b"refused"
    assert answer.header("x-should-retry") == b"false"
    assert upstream.connections == 0
    assert valkey.records() == {}
    unguarded = request("POST", "/", None, b"1", f"Authorization: {credential}")
    assert (await ask(gate.port, unguarded)).body == b"ok"


async def test_namespaces_do_not_meet(proxies, upstream, valkey):
    """Two deployments on one store that differ in their namespace share no key."""
    upstream.script = echo_tenant
    two = [proxies(upstream, valkey.url, NAMESPACE=name) for name in ("one", "two")]
    for status in (b"executed", b"replayed"):
        for proxy in two:
            assert (await ask(proxy.port, whose(ALICE))).header("oncegate-status") == status
    assert len(upstream.received) == 2


# Strings that must be found nowhere, and one that belongs to the stored answer alone.
KEY, TOKEN, API_KEY, COOKIE, BODY, TARGET = (
    "canary-key-5e1f", "canary-token-77aa", "canary-apikey-90b2", "canary-cookie-13cd", "canary-body-42ef",
    "canary-target-a8c3",
)  # fmt: skip
SECRETS = (KEY, TOKEN, API_KEY, COOKIE, BODY, TARGET, "canary-given-cookie-1b2b")
ANSWER = "canary-answer-6d0b"
GIVEN = b"Set-Cookie: sid=canary-given-cookie-1b2b\r\n"


def dump(valkey) -> bytes:
    """Return all that stands in the store."""
    return b"\n".join(
        part for key, fields in valkey.records().items() for pair in fields.items() for part in (key, *pair)
    )


def canary(case: str, body: str = BODY, *extra: str) -> bytes:
    headers = (f"X-Api-Key: {API_KEY}", f"Cookie: sid={COOKIE}", f"Authorization: Bearer {TOKEN}", *extra)
    return request("POST", f"/pay/{TARGET}", f"{KEY}-{case}", body.encode(), *headers)


# A problem names the key that its client sent.
OWN_KEY = re.compile(rb', "key": "[^"]*"')


@pytest.mark.parametrize("secret", ["", "0123456789abcdef0123456789abcdef"], ids=["without secret", "with secret"])
async def test_secrets_are_found_nowhere(proxies, upstream, valkey, secret):
    """Keys, credentials and requests stand in no store, log, metric or problem; an answer in its record alone.

    Nor does a path, where the log is told to leave it out.
    """
    settings = {"SECRET": secret} if secret else {}
    settings["ACCESS_LOG_PATH"] = "false"
    proxy = proxies(upstream, valkey.url, LOG_LEVEL="debug", MAX_STORED_BYTES=200_000, **settings)
    told: list[bytes] = []  # every answer that the proxy gave by itself
    stood: list[bytes] = []  # what stood in the store at each moment

    async def say(raw: bytes) -> None:
        told.append(OWN_KEY.sub(b"", (await ask(proxy.port, raw)).body))
        stood.append(dump(valkey))

    tap = Tap()
    upstream.script = tap.script
    running = asyncio.ensure_future(ask(proxy.port, canary("small")))
    await until(lambda: upstream.received)
    await say(canary("small"))  # in flight
    await say(canary("small", "other"))  # a mismatch
    text = ANSWER.encode()
    tap.end(b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (GIVEN, len(text), text))
    first = await running
    assert (first.body, first.header("set-cookie")) == (text, b"sid=canary-given-cookie-1b2b")
    stood.append(dump(valkey))
    replay = await ask(proxy.port, canary("small"))
    assert (replay.body, replay.header("set-cookie")) == (text, None)

    running = asyncio.ensure_future(ask(proxy.port, canary("large")))
    tap.send(CHUNKED, *[chunk(text * 1000)] * 6)
    await until(lambda: any(b"b0" in fields and b"state" in fields for fields in valkey.records().values()))
    stood.append(dump(valkey))
    tap.end(LAST_CHUNK)
    assert (await running).complete
    assert (await ask(proxy.port, canary("large"))).body == text * 6000

    running = asyncio.ensure_future(ask(proxy.port, canary("huge")))
    tap.end(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n", b"h" * 300_000)
    assert (await running).complete
    await say(canary("huge"))  # not kept

    async def hang_up(_, __, writer: asyncio.StreamWriter, ___: Received) -> None:
        writer.close()

    upstream.script = hang_up
    await say(canary("lost"))
    await say(canary("lost"))  # unknown
    await say(canary("bad, key"))
    await say(canary("twice", BODY, f"Idempotency-Key: {KEY}"))
    await say(request("POST", f"/{TARGET}", KEY, BODY.encode(), f"Authorization: Digest {TOKEN}"))
    await ask(proxy.port, request("GET", f"/{TARGET}", None, b"", f"Authorization: Bearer {TOKEN}"))

    stood.append(dump(valkey))
    log, metrics = proxy.log(), proxy.admin("/metrics")[1]
    assert proxy.stop() == 0
    log += proxy.log()
    for canary_string in SECRETS:
        assert canary_string not in log
        assert canary_string not in metrics
        assert canary_string.encode() not in b"\n".join(told)
        assert canary_string.encode() not in b"\n".join(stood)
    assert ANSWER not in log
    assert ANSWER not in metrics
    assert text not in b"\n".join(told)
    kept = [fields for fields in valkey.records().values() if any(text in value for value in fields.values())]
    assert len(kept) == 2
    assert all(text not in value for fields in kept for name, value in fields.items() if not name.startswith(b"b"))
