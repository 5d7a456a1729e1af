"""A store that loses data, fills up or dies, replicas that disagree: noticed, said, and as safe as was asked for."""

import asyncio
import json
import signal
import time

import pytest

from tests.parts import OK, RawClient, Tap, answering, ask, holding, request, until
from tests.resp import relaying

REFUSED, UNGUARDED = b"refused", b"unguarded"


def reasons(proxy) -> list[str]:
    return json.loads(proxy.admin("/readyz")[1])["reasons"]


def said(proxy, kind: str) -> list[dict]:
    return [line for line in proxy.events("store problem") if line["kind"] == kind]


def losses(proxy, kind: str) -> float:
    return proxy.metric(f'store_losses_total{{kind="{kind}"}}')


async def status(proxy, key: str = "key-1", *extra: str) -> tuple[int, bytes | None]:
    answer = await ask(proxy.port, request("POST", "/v1/charges", key, b"{}", *extra))
    return answer.status, answer.header("oncegate-status")


# Losses ...


@pytest.mark.fault(35, 59)
async def test_a_flush_is_noticed_and_requests_go_on(fork, upstream, own_valkey):
    """FLUSHALL is counted, logged and said on /readyz within 5 s, by each proxy; running keys by name."""
    tap = Tap()
    both = [await fork(upstream, own_valkey.url, LEASE_MS=600, QUARANTINE_S=3) for _ in range(2)]
    assert await status(both[0], "before") == (200, b"executed")
    upstream.script = tap.script
    running = asyncio.ensure_future(ask(both[0].port, request(key="running")))
    await until(lambda: len(upstream.received) == 2)
    assert reasons(both[0]) == []
    with own_valkey.client() as client:
        client.flushall()
    await until(lambda: all(said(proxy, "flushed") for proxy in both), 5)
    for proxy in both:
        assert losses(proxy, "flushed") == 1
        assert proxy.metric("claims_lost_total") >= 1
        code, text = proxy.admin("/readyz")
        assert (code, "lost everything" in text) == (200, True)
    await until(lambda: both[0].events("claim lost"), 5)
    upstream.script = answering(OK)
    tap.end(OK)
    assert (await running).header("oncegate-status") == b"executed"
    assert await status(both[1], "before") == (200, b"executed")  # nothing of it was left
    assert await status(both[1], "running", "Content-Type: x") == (422, REFUSED)
    await until(lambda: reasons(both[0]) == [])
    assert [losses(proxy, "flushed") for proxy in both] == [1, 1]


@pytest.mark.fault(59)
async def test_a_loss_quarantines_first_time_keys_everywhere(fork, upstream, own_valkey):
    """First-time keys are refused for a while, by all proxies and by one that starts meanwhile."""
    with own_valkey.client() as client:
        client.hset("once:epoch", mapping={"id": "old", "run": "", "until": 0})
    settings = {"ON_STORE_LOSS": "quarantine", "QUARANTINE_S": 5}
    one, two = [await fork(upstream, own_valkey.url, **settings) for _ in range(2)]
    assert await status(one, "before") == (200, b"executed")
    with own_valkey.client() as client:
        client.flushall()
        began = time.monotonic()
        await until(lambda: one.admin("/readyz")[0] == two.admin("/readyz")[0] == 503, 5)
        for proxy in (one, two):
            refused = await ask(proxy.port, request(key="unseen"))
            assert (refused.status, refused.slug) == (503, "store-unavailable")
            assert 1 <= int(refused.header("retry-after")) <= 5
            assert proxy.metric("quarantine_seconds") > 0
        one.kill()
        three = await fork(upstream, own_valkey.url, **settings)
        assert await status(three, "unseen") == (503, REFUSED)
        assert "first-time keys are refused" in reasons(three)[0]
        await until(lambda: three.admin("/readyz")[0] == 200, 12)
    assert time.monotonic() - began > 4
    assert await status(three, "unseen") == (200, b"executed")
    assert await status(two, "unseen") == (200, b"replayed")
    assert len(upstream.received) == 2


async def test_known_records_are_told_in_quarantine(fork, upstream, own_valkey):
    """A running key is settled and replayed, its mismatch refused, while first-time keys wait."""
    tap = Tap()
    upstream.script = tap.script
    proxy = await fork(upstream, own_valkey.url, ON_STORE_LOSS="quarantine", QUARANTINE_S=1)
    await until(lambda: proxy.admin("/readyz")[0] == 200)
    proxy.kill()
    proxy = await fork(upstream, own_valkey.url, ON_STORE_LOSS="quarantine", QUARANTINE_S=60)
    running = asyncio.ensure_future(ask(proxy.port, request(key="running")))
    await until(lambda: upstream.received)
    with own_valkey.client() as client:
        client.flushall()
    await until(lambda: proxy.admin("/readyz")[0] == 503, 5)
    tap.end(OK)
    assert (await running).header("oncegate-status") == b"executed"
    assert await status(proxy, "unseen") == (503, REFUSED)
    assert (await ask(proxy.port, request(key="running"))).header("oncegate-status") == b"replayed"
    assert (await ask(proxy.port, request(key="running", body=b"other"))).slug == "key-reused"
    assert len(upstream.received) == 1


async def test_a_new_store_is_quarantined_too(fork, upstream, own_valkey):
    """A store without an epoch is new, or lost everything: where a loss is to be waited for, so is this."""
    proxy = await fork(upstream, own_valkey.url, ON_STORE_LOSS="quarantine", QUARANTINE_S=2)
    assert await status(proxy) == (503, REFUSED)
    await until(lambda: proxy.admin("/readyz")[0] == 200)
    assert await status(proxy) == (200, b"executed")
    assert proxy.metric("claims_lost_total") == 0


@pytest.mark.fault(59)
async def test_a_restart_is_noticed_before_the_first_claim(fork, upstream, own_valkey):
    """a store that comes back empty is known for it when the connection stands."""
    with own_valkey.client() as client:
        client.hset("once:epoch", mapping={"id": "old", "run": "", "until": 0})
    proxy = await fork(upstream, own_valkey.url, ON_STORE_LOSS="quarantine", QUARANTINE_S=30)
    for round_ in range(3):
        own_valkey.kill()
        own_valkey.start()
        answers = await asyncio.gather(*[status(proxy, f"{round_}-{n}") for n in range(10)])
        assert set(answers) == {(503, REFUSED)}
    assert losses(proxy, "flushed") == 3
    assert upstream.received == []


@pytest.mark.fault(59)
async def test_a_store_that_went_back_is_caught(fork, upstream, own_valkey):
    """A snapshot that is older than what was acknowledged: the epoch is the same, the proxy's counter is not."""
    proxy = await fork(upstream, own_valkey.url)
    with own_valkey.client() as client:
        client.save()
        assert await status(proxy, "late") == (200, b"executed")
        name = next(client.scan_iter("once:replica:*"))
        before = int(client.get(name).split()[0])
        await until(lambda: int(client.get(name).split()[0]) > before)
    own_valkey.kill()
    own_valkey.start()  # from the snapshot
    await until(lambda: losses(proxy, "rolled_back") == 1, 5)
    assert proxy.metric("claims_lost_total") == 1
    assert losses(proxy, "flushed") == 0


async def test_a_restart_that_lost_nothing_is_no_loss(fork, upstream, own_valkey):
    """With everything on disk a restart is reported as one; no claim counts as lost."""
    proxy = await fork(upstream, own_valkey.url)
    assert await status(proxy, "kept") == (200, b"executed")
    with own_valkey.client() as client:
        client.config_set("appendfsync", "always")
        client.config_set("appendonly", "yes")
        await until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
        name = next(client.scan_iter("once:replica:*"))
        before = int(client.get(name).split()[0])
        await until(lambda: int(client.get(name).split()[0]) > before)
    own_valkey.kill()
    own_valkey.start("--appendonly", "yes", "--appendfsync", "always")
    await until(lambda: losses(proxy, "moved") == 1, 5)
    assert (proxy.metric("claims_lost_total"), losses(proxy, "rolled_back")) == (0, 0)
    assert await status(proxy, "kept") == (200, b"replayed")


@pytest.mark.fault(59)
async def test_another_database_is_another_store(fork, upstream, own_valkey):
    """what is asked suddenly lies in another database: as good as flushed."""
    proxy = await fork(upstream, own_valkey.url)
    with own_valkey.client() as client:
        client.swapdb(0, 1)
    await until(lambda: losses(proxy, "flushed") >= 1, 5)
    assert proxy.metric("claims_lost_total") >= 1  # a swap between two looks at it counts twice


@pytest.mark.fault(14)
async def test_evictions_are_counted_as_losses(fork, upstream, own_valkey):
    """an evicting policy set at run time is noticed within 5 s, and so is that it evicted."""
    proxy = await fork(upstream, own_valkey.url)
    with own_valkey.client() as client:
        client.config_set("maxmemory-policy", "allkeys-random")
        await until(lambda: "maxmemory-policy" in proxy.admin("/readyz")[1], 5)
        assert proxy.admin("/readyz")[0] == 503
        for n in range(200):
            client.set(f"filler-{n}", bytes(10_000))
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 500_000)
        client.set("one-more", "1")
        await until(lambda: losses(proxy, "evicted") >= 1, 5)
        assert proxy.metric("claims_lost_total") >= 1
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")
    await until(lambda: proxy.admin("/readyz")[0] == 200)


@pytest.mark.fault(13)
async def test_a_full_store_is_not_ready(fork, upstream, own_valkey):
    """at its memory limit new keys are refused: said on /readyz and in a metric, known keys answered."""
    proxy = await fork(upstream, own_valkey.url)
    assert await status(proxy, "known") == (200, b"executed")
    with own_valkey.client() as client:
        client.set("filler", bytes(2_000_000))
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 1_000_000)
        assert await status(proxy, "new") == (503, REFUSED)
        assert "memory is full" in proxy.admin("/readyz")[1]
        assert proxy.metric("store_full") == 1
        assert await status(proxy, "known") == (200, b"replayed")
        client.delete("filler")
        client.config_set("maxmemory", 0)
    await until(lambda: proxy.admin("/readyz")[0] == 200)
    assert proxy.metric("store_full") == 0
    assert await status(proxy, "new") == (200, b"executed")


async def test_a_server_that_refuses_info(fork, upstream, own_valkey):
    """Managed servers do: one line says so, everything else works, losses too."""
    with own_valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "plain", "on", ">pw", "~once:*", "+@all", "-info", "-config")
    url = own_valkey.url.replace("redis+unix://", "redis+unix://plain:pw@")
    proxy = await fork(upstream, url)
    assert await status(proxy) == (200, b"executed")
    assert len(said(proxy, "info")) == 1
    assert proxy.admin("/readyz")[0] == 200
    with own_valkey.client() as client:
        client.flushall()
    await until(lambda: losses(proxy, "flushed") == 1, 5)
    assert len(said(proxy, "info")) == 1


# Replicas that disagree ...


IDENTITIES = [
    ("NAMESPACE", "other", "namespace"),
    ("SECRET", "another-secret-of-32-bytes-or-so", "secret"),
    ("SCOPE_HEADERS", "X-Tenant", "scope"),
    ("KEY_HEADER", "X-Key", "key_header"),
]


@pytest.mark.fault(18)
async def test_a_replica_with_another_identity_accepts_nothing(fork, upstream, own_valkey):
    """it is not ready and refuses keyed requests; the first goes on; what has no key passes."""
    first = await fork(upstream, own_valkey.url, IDENTITY_CHANGE="refuse")
    for setting, value, named in IDENTITIES:
        second = await fork(upstream, own_valkey.url, IDENTITY_CHANGE="refuse", **{setting: value})
        assert second.admin("/readyz")[0] == 503
        assert f"({named})" in reasons(second)[0]
        assert [line["level"] for line in said(second, "identity")] == ["error"]
        key = "X-Key: key-1" if setting == "KEY_HEADER" else "Idempotency-Key: key-1"
        answer = await ask(second.port, request("POST", "/v1/charges", None, b"{}", key))
        assert (answer.status, answer.slug) == (503, "store-unavailable")
        assert (await ask(second.port, request("GET", "/", None, b""))).status == 200
        second.kill()
    assert await status(first) == (200, b"executed")
    assert first.admin("/readyz")[0] == 200
    with own_valkey.client() as client:
        stored = b" ".join(client.hvals("once:identities"))
    assert b"another-secret" not in stored
    assert len(upstream.received) == len(IDENTITIES) + 1


@pytest.mark.fault(18)
async def test_a_declared_change_of_identity(fork, upstream, own_valkey):
    """with `accept` it works beside the others; that is logged and counted."""
    first = await fork(upstream, own_valkey.url, IDENTITY_CHANGE="refuse")
    second = await fork(upstream, own_valkey.url, NAMESPACE="other", IDENTITY_CHANGE="accept")
    assert await status(first) == await status(second) == (200, b"executed")
    assert len(said(second, "accepted")) == second.metric("identity_accepted_total") == 1
    third = await fork(upstream, own_valkey.url, NAMESPACE="other", IDENTITY_CHANGE="refuse")  # it is known by now
    assert await status(third) == (200, b"replayed")
    await asyncio.sleep(1.5)
    assert [proxy.admin("/readyz")[0] for proxy in (first, second, third)] == [200, 200, 200]
    assert second.metric("identity_accepted_total") == 1


async def test_a_version_that_names_otherwise_is_refused_until_it_is_declared(fork, upstream, own_valkey):
    """On a store whose keys another version of naming made, a proxy is ready only where the change is declared."""
    with own_valkey.client() as client:
        seconds, _ = client.time()
        others = "namespace=default secret=none scope=known key_header=idempotency-key"
        for naming in ("", "naming=1 "):
            client.delete("once:identities")
            client.hset("once:identities", "0" * 32, f"{seconds * 1000} {naming}{others}")
            refused = await fork(upstream, own_valkey.url, IDENTITY_CHANGE="refuse")
            assert "(naming)" in reasons(refused)[0]
            assert await status(refused) == (503, REFUSED)
            refused.kill()
    declared = await fork(upstream, own_valkey.url, IDENTITY_CHANGE="accept")
    assert await status(declared) == (200, b"executed")


async def test_an_identity_is_known_as_long_as_its_longest_key(fork, upstream, own_valkey, tmp_path):
    """How a proxy names keys is remembered for the longest retention that any of its rules has."""
    file = tmp_path / "rules.toml"
    file.write_text('[[rule]]\nname = "a"\npath = "/a"\nretention_s = 20000000\n')
    proxy = await fork(upstream, own_valkey.url, RULES_FILE=file)
    assert await status(proxy) == (200, b"executed")
    with own_valkey.client() as client:
        assert client.pttl("once:identities") > 19_000_000_000


async def test_a_refused_replica_does_not_found_what_the_others_lost(fork, upstream, own_valkey):
    """After a flush those who served before come first; the one that was refused goes on being refused."""
    first = await fork(upstream, own_valkey.url, IDENTITY_CHANGE="refuse")
    second = await fork(upstream, own_valkey.url, NAMESPACE="other", IDENTITY_CHANGE="refuse")
    first.signal(signal.SIGSTOP)
    with own_valkey.client() as client:
        client.flushall()
    await until(lambda: said(second, "flushed"), 5)
    await asyncio.sleep(1)
    first.signal(signal.SIGCONT)
    await until(lambda: said(first, "flushed"), 5)
    assert (first.admin("/readyz")[0], second.admin("/readyz")[0]) == (200, 503)
    assert await status(second) == (503, REFUSED)
    assert await status(first) == (200, b"executed")


async def test_other_rules_are_known_to_the_others(fork, upstream, own_valkey, tmp_path):
    """What names keys stands in the store, as of the last reload, for others to compare; nobody is refused for it."""
    file = tmp_path / "rules.toml"
    file.write_text('[[rule]]\nname = "a"\nkey = "header:X-Key"\n')
    proxies = [await fork(upstream, own_valkey.url, IDENTITY_CHANGE="refuse", RULES_FILE=file)]

    def noted() -> set[bytes]:
        with own_valkey.client() as client:
            fields = client.hkeys("once:members")
            return {field for field in fields if field not in (b"since", b"seen", b"new") and field[:5] != b"name:"}

    before = noted()
    assert len(before) == 1
    file.write_text(file.read_text() + 'namespace = "n"\n')
    proxies[0].signal(signal.SIGHUP)
    await until(lambda: len(noted()) == 1 and noted() != before, 5)
    proxies.append(await fork(upstream, own_valkey.url, IDENTITY_CHANGE="refuse"))
    await until(lambda: len(noted()) == 2, 5)
    for proxy in proxies:
        assert await status(proxy, "key-1", "X-Key: key-1") == (200, b"executed")
        assert (proxy.admin("/readyz")[0], proxy.metric("rules_differ")) == (200, 0)


# A store that is down ...


@pytest.mark.fault(7)
async def test_a_dead_store_costs_milliseconds(fork, upstream, own_valkey):
    """After some claims in a row timed out, the rest is refused at once; it recovers within a second."""
    proxy = await fork(upstream, own_valkey.url, STORE_TIMEOUT_MS=300)
    assert await status(proxy, "before") == (200, b"executed")
    own_valkey.pause()
    for n in range(3):
        assert await status(proxy, f"slow-{n}") == (503, REFUSED)
    began = time.monotonic()
    for n in range(50):
        assert await status(proxy, f"quick-{n}") == (503, REFUSED)
    assert time.monotonic() - began < 1.5
    assert proxy.metric("store_breaker_open") == proxy.metric("store_breaker_opened_total") == 1
    assert [bool(line["reason"]) for line in proxy.events("store circuit breaker opened")] == [True]
    assert proxy.admin("/readyz")[0] == 503
    own_valkey.resume()
    await until(lambda: proxy.admin("/readyz")[0] == 200, 5)  # by itself: a proxy that is not ready gets no requests
    assert await status(proxy, "after") == (200, b"executed")
    assert proxy.metric("store_breaker_open") == 0
    assert len(upstream.received) == 2
    await until(lambda: own_valkey.states() == [b"complete"] * 2)


async def test_one_slow_reply_opens_nothing(fork, upstream, own_valkey):
    """Many claims that wait for the same slow reply fail together, and that is one failure."""
    proxy = await fork(upstream, own_valkey.url, STORE_TIMEOUT_MS=300)
    assert await status(proxy, "before") == (200, b"executed")
    own_valkey.pause()
    answers = await asyncio.gather(*[status(proxy, f"key-{n}") for n in range(40)])
    own_valkey.resume()
    assert set(answers) == {(503, REFUSED)}
    assert proxy.metric("store_breaker_opened_total") == 0
    await until(lambda: proxy.admin("/readyz")[0] == 200)
    assert await status(proxy, "after") == (200, b"executed")


async def test_settles_are_not_stopped_by_the_breaker(fork, upstream, own_valkey):
    """Claims are given up on; the answer of a running request is stored as soon as the store is back."""
    go = asyncio.Event()
    upstream.script = holding(go)
    proxy = await fork(upstream, own_valkey.url, STORE_TIMEOUT_MS=300)
    running = asyncio.ensure_future(ask(proxy.port, request(key="running")))
    await until(lambda: upstream.received)
    own_valkey.pause()
    for n in range(4):
        await status(proxy, f"key-{n}")
    assert proxy.metric("store_breaker_open") == 1
    go.set()
    await asyncio.wait([running], timeout=0.5)
    assert not running.done()
    own_valkey.resume()
    assert (await running).header("oncegate-status") == b"executed"


@pytest.mark.fault(6)
async def test_bypass_passes_what_cannot_be_claimed(fork, upstream, own_store):
    """With `bypass` a dead store lets requests pass, and they say so; back again, keys are guarded."""
    proxy = await fork(upstream, own_store.url, STORE_TIMEOUT_MS=300, ON_STORE_DOWN="bypass")
    assert await status(proxy, "before") == (200, b"executed")
    own_store.kill()
    for _ in range(5):
        assert await status(proxy) == (200, UNGUARDED)
    began = time.monotonic()
    for _ in range(20):
        assert await status(proxy) == (200, UNGUARDED)
    assert time.monotonic() - began < 1.5
    big = await ask(proxy.port, request(body=bytes(2_000_000)))
    assert (big.status, len(upstream.received[-1].body)) == (200, 2_000_000)
    upstream.script = answering(b"garbage\r\n\r\n")
    lost = await ask(proxy.port, request())
    assert (lost.slug, lost.header("oncegate-status")) == ("upstream-lost", UNGUARDED)
    upstream.script = answering(OK)
    assert proxy.metric('requests_total{outcome="unguarded"}') == 26
    assert proxy.metric('unguarded_total{reason="store_unavailable"}') == 27
    assert proxy.metric('unguarded_total{reason="key_missing"}') == 0
    own_store.start()
    await until(lambda: proxy.admin("/readyz")[0] == 200)
    assert await status(proxy) == (200, b"executed")
    assert await status(proxy) == (200, b"replayed")


@pytest.mark.fault(8)
async def test_an_ambiguous_claim_is_not_bypassed(fork, upstream, own_valkey):
    """A claim whose reply was lost may stand: that request is refused, not executed beside its own claim."""
    async with relaying(own_valkey.socket) as relay:
        proxy = await fork(upstream, relay.url, STORE_TIMEOUT_MS=500, ON_STORE_DOWN="bypass")
        await until(lambda: proxy.admin("/readyz")[0] == 200)
        relay.lose_reply(then_unreachable=True)
        assert await status(proxy) == (503, REFUSED)
        assert own_valkey.states() == [b"in_flight"]
        assert upstream.received == []
        relay.unreachable = False
        await until(lambda: own_valkey.states() == [])
        assert await status(proxy) == (200, b"executed")


async def test_a_known_original_is_not_bypassed(fork, upstream, own_valkey):
    """A duplicate of what this proxy is executing, or that waited for its original, is never passed on."""
    go = asyncio.Event()
    upstream.script = holding(go)
    proxy = await fork(upstream, own_valkey.url, STORE_TIMEOUT_MS=300, ON_STORE_DOWN="bypass")
    running = asyncio.ensure_future(ask(proxy.port, request()))
    await until(lambda: upstream.received)
    own_valkey.kill()
    for _ in range(5):
        assert await status(proxy) == (503, REFUSED)
    assert len(upstream.received) == 1
    own_valkey.start()
    go.set()
    assert (await running).header("oncegate-status") == b"executed"


async def test_quarantine_and_identity_are_not_bypassed(fork, upstream, own_valkey):
    """`bypass` is for a store that is down, not for what is refused on purpose."""
    bypass = {"IDENTITY_CHANGE": "refuse", "ON_STORE_DOWN": "bypass", "ON_STORE_LOSS": "quarantine", "QUARANTINE_S": 30}
    quarantined = await fork(upstream, own_valkey.url, **bypass)
    other = await fork(upstream, own_valkey.url, NAMESPACE="other", **bypass)
    assert await status(quarantined) == await status(other) == (503, REFUSED)
    assert upstream.received == []


async def test_a_client_that_leaves_an_unguarded_answer(fork, upstream, own_valkey):
    """Nothing is stored for it, and nothing hangs."""
    own_valkey.kill()
    tap = Tap()
    upstream.script = tap.script
    proxy = await fork(upstream, own_valkey.url, STORE_TIMEOUT_MS=100, ON_STORE_DOWN="bypass")
    client = await RawClient.open(proxy.port)
    client.writer.write(request())
    await until(lambda: upstream.received)
    client.reset()
    tap.end(OK)
    await until(lambda: proxy.metric("in_flight") == 0)
