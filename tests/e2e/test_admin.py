"""What operators see: metrics, health, the commands that ask, and the logs."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import trustme
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from oncegate.admin import serving
from oncegate.admin.parts import at_once
from oncegate.observe.metrics import Metrics
from oncegate.store.membership import HEALTH_S
from tests.admin_parts import OPERATE, admin_parts, tokens_file
from tests.parts import OK, Proxy, RawClient, RawUpstream, answering, ask, holding, lazy, request, until
from tests.test_access import client_of, files_of

CANARY = "c4n4ry-of-16-bytes"

# DESIGN.md, section 8: every metric with its type and the closed set of its label's values.
OUTCOMES = (
    "executed", "replayed", "reconciled", "joined", "released", "unknown", "passthrough", "unguarded", "preflight",
    "key_missing",
    "key_invalid", "scope_unstable", "request_refused", "body_too_large", "overloaded", "store_unavailable",
    "upstream_unreachable", "in_flight", "key_reused", "outcome_unknown", "response_not_kept", "key_expired",
    "record_corrupt", "upstream_lost", "upstream_timeout", "truncated", "cancelled", "answer_not_stored", "fenced",
    "failed", "client_gone", "resumed", "stopped", "accepted", "asked", "key_absent", "key_released", "ask_refused",
    "stream_gone", "broken_off",
)  # fmt: skip
SETTLEMENTS = ("stored", "stored_without_body", "released", "unknown", "cancelled", "unconfirmed", "lost", "fenced")
SUPPRESSED = (
    "replayed",
    "reconciled",
    "joined",
    "in_flight",
    "key_reused",
    "outcome_unknown",
    "response_not_kept",
    "key_expired",
)
LOSSES = ("flushed", "rolled_back", "evicted", "moved")
WAIT_ENDS = (
    "record_changed", "head_came", "store_silent", "may_claim", "declined", "no_verdict", "sent_away", "timed_out",
    "client_gone",
    "no_room",
    "no_room_for_body",
)  # fmt: skip
TOKENS = ("input", "cached", "cache_write", "output")
VERBS = ("claim", "append", "renew", "settle", "read", "follow", "connect")
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "requests": ("counter", "outcome", OUTCOMES),
    "rule_requests": ("counter", "outcome", OUTCOMES),
    "settled": ("counter", "settlement", SETTLEMENTS),
    "duplicates_suppressed": ("counter", "outcome", SUPPRESSED),
    "upstream_seconds_saved": ("counter", "", ()),
    "replayed_bytes": ("counter", "", ()),
    "llm_tokens_saved": ("counter", "kind", TOKENS),
    "llm_replays_without_usage": ("counter", "", ()),
    "cancels": ("counter", "by", ("client_gone", "call", "address", "operator")),
    "claims_lost": ("counter", "", ()),
    "store_losses": ("counter", "kind", LOSSES),
    "identity_accepted": ("counter", "", ()),
    "store_breaker_opened": ("counter", "", ()),
    "store_retries": ("counter", "", ()),
    "without_credential": ("counter", "", ()),
    "unguarded": ("counter", "reason", ("store_unavailable", "key_missing", "key_invalid", "no_duplicate")),
    "unguarded_keys": ("counter", "reason", ("method", "name")),
    "waits": ("counter", "end", WAIT_ENDS),
    "wait_polls": ("counter", "", ()),
    "close_delimited": ("counter", "", ()),
    "client_connections": ("counter", "event", ("opened", "refused")),
    "heartbeats": ("counter", "kind", ("interim", "comment")),
    "pages": ("counter", "", ()),
    "upstream_connections": ("counter", "event", ("opened", "reused", "failed", "no_room")),
    "dns_lookups": ("counter", "result", ("unchanged", "changed", "no_address", "failed")),
    "spans": ("counter", "end", ("exported", "lost")),
    "traces_limited": ("counter", "", ()),
    "worker_restarts": ("counter", "", ()),
    "request_seconds": ("histogram", "", ()),
    "overhead_seconds": ("histogram", "", ()),
    "upstream_seconds": ("histogram", "", ()),
    "store_seconds": ("histogram", "verb", VERBS),
    "in_flight": ("gauge", "", ()),
    "in_flight_oldest_seconds": ("gauge", "", ()),
    "reading_bodies": ("gauge", "", ()),
    "waiting": ("gauge", "", ()),
    "followers": ("gauge", "", ()),
    "store_memory_ratio": ("gauge", "", ()),
    **{
        f"store_{name}": ("gauge", "", ())
        for name in (
            "behind_seconds",
            "snapshot_seconds",
            "hot_ratio",
            "dead_ratio",
            "record_bytes",
            "chunk_bytes",
            "audit_bytes",
        )
    },
    "store_full": ("gauge", "", ()),
    "store_breaker_open": ("gauge", "", ()),
    "rules_differ": ("gauge", "", ()),
    "packs_records": ("gauge", "", ()),
    "unknown_keys": ("gauge", "", ()),
    "unknown_keys_expiring": ("gauge", "", ()),
    **dict.fromkeys(
        (
            *("open_unknown_keys", "open_lapsed_keys", "open_in_flight_keys", "open_waived_keys"),
            *("open_unknown_oldest_seconds", "open_lapsed_oldest_seconds"),
        ),
        ("gauge", "", ()),
    ),
    "quarantine_seconds": ("gauge", "", ()),
    "ready": ("gauge", "", ()),
    "buffered_bytes": ("gauge", "", ()),
    "workers": ("gauge", "", ()),
    "start_time_seconds": ("gauge", "", ()),
    "config_last_reload_success_timestamp_seconds": ("gauge", "", ()),
    "config_last_reload_failure_timestamp_seconds": ("gauge", "", ()),
    "client_open_connections": ("gauge", "", ()),
    "upstream_pool": ("gauge", "state", ("active", "idle", "connecting", "waiting")),
    "build": ("info", "", ()),
    "reconciled": ("counter", "by", ("janitor", "duplicate", "resend", "operator")),
    "reconciled_age_seconds": ("histogram", "", ()),
    # Of rules that reconcile, of which there is none here.
    **dict.fromkeys(("probes", "left_to_a_person"), ("counter", "", ())),
}
OWN_LABELS = ("le", "version")  # of histograms and of the build
# What an operator named: the rules and their upstreams.
NAMED = {
    "llm_tokens_saved": {"rule": "(default)"},
    "rule_requests": {"rule": "(default)", "upstream": "127.0.0.1"},
    "upstream_seconds": {"upstream": "127.0.0.1"},
    "upstream_connections": {"upstream": "127.0.0.1"},
    "upstream_pool": {"upstream": "127.0.0.1"},
}


def families(proxy: Proxy) -> dict[str, Metric]:
    status, text = proxy.admin("/metrics")
    assert status == 200
    found = {family.name.removeprefix("oncegate_"): family for family in text_string_to_metric_families(text)}
    # This format knows no info: prometheus_client writes a gauge called ..._info.
    if "build_info" in found:
        found["build"] = found.pop("build_info")
        found["build"].type = "info"
    return found


def settings_of(proxy: Proxy, **more: object) -> dict[str, str]:
    """Return the environment in which a command finds the running proxy."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}
    more |= {"UPSTREAM": "http://127.0.0.1:9", "ADMIN_LISTEN": f"127.0.0.1:{proxy.admin_port}"}
    return env | {f"ONCEGATE_{name}": str(value) for name, value in more.items()}


def oncegate(command: str, *options: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "oncegate", command, *options],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=30,
    )


async def traffic(proxy: Proxy, upstream: RawUpstream) -> Counter[str]:
    """Cause as many outcomes as one proxy can in peace; return how many of which."""
    rows: list[tuple[str, bytes, bytes]] = [
        ("executed", OK, request(key=f"{CANARY}-1")),
        ("replayed", OK, request(key=f"{CANARY}-1")),
        ("replayed", OK, request(key=f'"{CANARY}-1"')),
        ("key_reused", OK, request(key=f"{CANARY}-1", body=CANARY.encode())),
        ("key_invalid", OK, request(key=f"{CANARY},")),
        ("request_refused", OK, request("GET", f"/{CANARY}#x", None, b"")),
        ("request_refused", OK, request("TRACE", f"/{CANARY}", None, b"")),
        ("request_refused", OK, f"{CANARY}\r\n\r\n".encode()),  # nothing that could be parsed
        ("body_too_large", OK, request(key=CANARY, body=b"x" * 5000)),
        ("passthrough", OK, request("GET", f"/{CANARY}?{CANARY}", None, b"")),
        ("passthrough", OK, request("PURGE", f"/{CANARY}", CANARY, b"")),
        ("released", b"HTTP/1.1 429 No\r\nContent-Length: 0\r\n\r\n", request(key=f"{CANARY}-2")),
        ("unknown", b"HTTP/1.1 502 No\r\nContent-Length: 0\r\n\r\n", request(key=f"{CANARY}-3")),
        ("outcome_unknown", OK, request("POST", "/v1/charges", f"{CANARY}-3")),
        ("upstream_lost", b"garbage\r\n\r\n", request(key=f"{CANARY}-4")),
        ("upstream_lost", b"garbage\r\n\r\n", request("GET", key=None, body=b"")),
        ("executed", b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n" + bytes(9000), request(key=f"{CANARY}-5")),
        ("response_not_kept", OK, request(key=f"{CANARY}-5")),
        ("truncated", b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n" + bytes(9000), request(key=f"{CANARY}-6")),
    ]
    for outcome, answer, raw in rows:
        upstream.script = cut(answer) if outcome == "truncated" else answering(answer)
        with closing(await RawClient.open(proxy.port)) as client:
            await client.ask(raw)
    go = asyncio.Event()
    upstream.script = holding(go)
    running = asyncio.ensure_future(ask(proxy.port, request(key=f"{CANARY}-7")))
    await until(lambda: proxy.metric("in_flight") == 1)
    await until(lambda: 0 < proxy.metric("in_flight_oldest_seconds") < 60)
    assert (await ask(proxy.port, request(key=f"{CANARY}-7"))).slug == "in-flight"
    go.set()
    await running
    return Counter([*[outcome for outcome, _, _ in rows], "in_flight", "executed"])


def cut(answer: bytes):
    async def script(_, __, writer, ___):
        writer.write(answer)
        writer.close()

    return script


SMALL = {"MAX_REQUEST_BYTES": 4096, "MAX_STORED_BYTES": 8192}

# Metrics ...


async def test_metrics_are_those_of_the_design_and_no_others(proxies, upstream, valkey):
    """Each metric has its type, and its labels take the values of a closed set, whatever requests said."""
    gate = proxies(upstream, valkey.url, **SMALL)
    for round_ in range(2):
        found = families(gate)
        assert {name: family.type for name, family in found.items()} == {name: row[0] for name, row in METRICS.items()}
        for name, family in found.items():
            assert family.documentation
            _, label, values = METRICS[name]
            labels = {key for sample in family.samples for key in sample.labels if key not in OWN_LABELS}
            assert labels == ({label} if label else set()) | NAMED.get(name, {}).keys()
            for named, value in NAMED.get(name, {}).items():
                assert {sample.labels[named].partition(":")[0] for sample in family.samples} - {"(none)"} == {value}
            assert {sample.labels[label] for sample in family.samples if label} == set(values)
        if round_ == 0:
            await traffic(gate, upstream)
    assert CANARY not in gate.admin("/metrics")[1]


async def test_every_request_is_counted_once_under_its_outcome(proxies, upstream, valkey):
    """requests_total says what became of each request; the other counters agree with it."""
    gate = proxies(upstream, valkey.url, **SMALL)
    wanted = await traffic(gate, upstream)
    total = wanted.total()
    await until(lambda: gate.metric("request_seconds_count") == total)
    samples = families(gate)["requests"].samples
    assert {sample.labels["outcome"]: sample.value for sample in samples if sample.value} == dict(wanted)
    by_rule = {one.labels["outcome"]: one.value for one in families(gate)["rule_requests"].samples if one.value}
    assert by_rule == dict(wanted)
    for outcome in SUPPRESSED:
        assert gate.metric(f'duplicates_suppressed_total{{outcome="{outcome}"}}') == wanted[outcome]
    assert gate.metric("replayed_bytes_total") == 2 * len("ok")
    assert gate.metric("without_credential_total") > 0
    assert gate.metric('settled_total{settlement="released"}') == 1
    assert gate.metric('settled_total{settlement="stored_without_body"}') == 1
    assert gate.metric('settled_total{settlement="unknown"}') == 3
    assert gate.metric('store_seconds_count{verb="claim"}') >= 9
    for name in ("request_seconds", "overhead_seconds", "upstream_seconds"):
        buckets = [sample.value for sample in families(gate)[name].samples if sample.name.endswith("_bucket")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == sum(one.value for one in families(gate)[name].samples if one.name.endswith("_count"))
    for gauge in ("in_flight", "in_flight_oldest_seconds", "waiting", "buffered_bytes"):
        assert gate.metric(gauge) == 0
    assert gate.metric("ready") == 1


# Health ...


async def test_a_proxy_is_alive_while_its_store_is_not(proxies, upstream, own_valkey, tmp_path):
    """/readyz and `healthcheck --ready` follow the store, with the reason; /healthz and `healthcheck` do not."""
    gate = proxies(upstream, own_valkey.url)
    env = settings_of(gate)

    async def assert_ready(reason: str | None) -> None:
        await until(lambda: gate.admin("/readyz")[0] == (503 if reason else 200), 20)
        text = gate.admin("/readyz")[1]
        said = json.loads(text)
        assert said["ready"] is (reason is None)
        reasons = [one for one in said["reasons"] if "store lost" not in one]  # of the restart below
        assert [reason in one for one in reasons] == ([True] if reason else []), text
        assert (gate.admin("/healthz")[0], gate.metric("ready")) == (200, 0 if reason else 1)

    def assert_commands(reason: str | None) -> None:
        alive = oncegate("healthcheck", env=env, cwd=tmp_path)
        assert (alive.returncode, alive.stderr) == (0, "")
        ready = oncegate("healthcheck", "--ready", env=env, cwd=tmp_path)
        assert (ready.returncode, reason is None or reason in ready.stderr) == (1 if reason else 0, True)

    await assert_ready(None)
    assert_commands(None)
    with own_valkey.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        await assert_ready("maxmemory-policy is allkeys-lru")
        client.config_set("maxmemory-policy", "noeviction")
    await assert_ready(None)
    own_valkey.pause()
    await assert_ready("not reachable")
    own_valkey.resume()
    await assert_ready(None)
    own_valkey.kill()
    await assert_ready("not reachable")
    assert_commands("not reachable")
    assert (await ask(gate.port, request())).slug == "store-unavailable"
    assert (await ask(gate.port, request(key=None))).status == 200
    own_valkey.start()
    await assert_ready(None)
    assert (await ask(gate.port, request())).header("oncegate-status") == b"executed"


async def test_a_proxy_that_starts_without_its_store_listens_and_says_so(proxies, upstream, own_valkey):
    """The store may come later: until then the proxy is alive, not ready, and passes what needs no store."""
    own_valkey.kill()
    gate = proxies(upstream, own_valkey.url)
    assert (gate.admin("/healthz")[0], gate.admin("/readyz")[0]) == (200, 503)
    assert (await ask(gate.port, request(key=None))).status == 200
    answer = await ask(gate.port, request())
    assert (answer.status, answer.slug, answer.header("oncegate-status")) == (503, "store-unavailable", b"refused")
    own_valkey.start()
    await until(lambda: gate.admin("/readyz")[0] == 200)
    assert (await ask(gate.port, request())).header("oncegate-status") == b"executed"


async def test_a_draining_proxy_is_alive_and_not_ready(proxies, upstream, valkey):
    """After SIGTERM the proxy goes on serving for DRAIN_DELAY_S, and /readyz says that it is shutting down."""
    gate = proxies(upstream, valkey.url, DRAIN_DELAY_S=1)
    gate.signal(signal.SIGTERM)
    await until(lambda: gate.admin("/readyz")[0] == 503)
    assert "shutting down" in gate.admin("/readyz")[1]
    assert gate.admin("/healthz")[0] == 200
    assert (await ask(gate.port, request())).header("oncegate-status") == b"executed"
    assert gate.process.wait(20) == 0


async def test_an_admin_connection_ends_however_slow_its_client(monkeypatch):
    """Whoever sends nothing, half a head, a body by the byte, or reads nothing of its answers is cut off; each
    connection serves one request, so that nobody else is."""

    class Large(Metrics):
        def text(self, accept: str = "") -> tuple[bytes, str]:
            return b"x" * (8 << 20), "text/plain"

    monkeypatch.setattr(serving, "CONNECTION_S", 2.0)
    listener = await serving.serve_admin(admin_parts(metrics=at_once(lambda: Large("0", {}))))
    port = listener.address.port
    get = request("GET", "/metrics", None, b"")
    slow = [await lazy(port) for _ in range(4)]
    sent = (b"", get[:20], request("GET", "/metrics", None, b"", "Content-Length: 9"), get * 9)
    for client, raw in zip(slow, sent, strict=True):
        client.writer.write(raw)
    await until(lambda: len(listener.connections) == 4)
    for path, size in (("/metrics", 8 << 20), ("/nothing", 14), ("/healthz", 15)):
        answer = await ask(port, request("GET", path, None, b""))
        assert (len(answer.body), answer.complete, answer.header("connection")) == (size, True, b"close")
    await until(lambda: not listener.connections)
    for client in slow:
        client.reset()
    await listener.close()


async def test_healthcheck_without_a_proxy_fails(tmp_path):
    """No answer is no health, for both questions; settings that cannot be used are said as well."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("ONCEGATE_")}
    env |= {"ONCEGATE_UPSTREAM": "http://127.0.0.1:9", "ONCEGATE_ADMIN_LISTEN": f"127.0.0.1:{port}"}
    for options in ([], ["--ready"]):
        asked = oncegate("healthcheck", *options, env=env, cwd=tmp_path)
        assert (asked.returncode, asked.stdout) == (1, "")
        assert f"no answer from 127.0.0.1:{port}" in asked.stderr
    asked = oncegate("healthcheck", env=env | {"ONCEGATE_UPSTREAM": "nowhere"}, cwd=tmp_path)
    assert (asked.returncode, asked.stderr.startswith("ONCEGATE_UPSTREAM: ")) == (2, True)


@pytest.mark.parametrize("workers", [1, 2])
async def test_roles_of_a_proxy(proxies, upstream, tmp_path, workers):
    """With one worker and with several, the pages, tokens and certificates of the admin listener are the settings',
    also those of a reload; `oncegate check` reads the files, and `oncegate healthcheck` asks over TLS."""
    authority = trustme.CA()
    tokens = tokens_file(tmp_path)
    settings = files_of(authority, tmp_path) | {"admin_tokens_file": tokens, "admin_users": "view:scraper"}
    proxy = proxies(upstream, WORKERS=workers, **{name.upper(): value for name, value in settings.items()})

    async def seen(*fields: str, certificate: str = "") -> tuple[int, bytes]:
        tls = client_of(authority, *filter(None, [certificate]))
        client = await RawClient.open(proxy.admin_port, ssl=tls, server_hostname="localhost")
        with closing(client):
            answer = await client.ask(request("GET", "/", None, b"", *fields, host="oncegate.internal"))
        name = re.search(rb"(\w+), (view|operate)", answer.body)
        return answer.status, name[0] if name else b""

    bearer = f"Authorization: Bearer {OPERATE}"
    assert await seen() == (401, b"")
    assert await seen(bearer) == (200, b"olga, operate")
    assert await seen(certificate="scraper") == (200, b"scraper, view")
    assert await seen(certificate="stranger") == (403, b"")
    env = settings_of(proxy, **{name.upper(): value for name, value in settings.items()})
    asked = oncegate("healthcheck", env=env, cwd=tmp_path)
    assert (asked.returncode, asked.stdout) == (0, '{"alive": true}\n')
    checked = oncegate("check", env=env, cwd=tmp_path)
    assert (checked.returncode, OPERATE in checked.stdout) == (0, False)
    tokens.write_text(f"view oscar {OPERATE}")
    proxy.signal(signal.SIGHUP)
    deadline = time.monotonic() + 30
    while await seen(bearer) != (200, b"oscar, view"):
        assert time.monotonic() < deadline
    tokens.chmod(0o644)
    checked = oncegate("check", env=env, cwd=tmp_path)
    assert (checked.returncode, checked.stderr.startswith("ONCEGATE_ADMIN_TOKENS_FILE: everybody")) == (2, True)


# `oncegate check` ...


def test_check_prints_what_is_in_effect(tmp_path):
    """One `NAME = value` a line for every setting, defaults and overrides, with the secrets masked."""
    env = {"PATH": os.environ["PATH"], "ONCEGATE_UPSTREAM": "HTTPS://Api.Test/v1/", "ONCEGATE_LEASE_MS": "2500"}
    env |= {"ONCEGATE_SECRET": CANARY, "ONCEGATE_STORE_URL": f"rediss://me:{CANARY}@redis:6379/2"}
    env |= {"ONCEGATE_HOSTS": "api.test"}
    check = oncegate("check", env=env, cwd=tmp_path)
    assert (check.returncode, check.stderr) == (0, "")
    lines = dict(line.split(" = ", 1) for line in check.stdout.splitlines())
    assert all(re.fullmatch(r"ONCEGATE_[A-Z_]+", name) for name in lines)
    assert lines["ONCEGATE_UPSTREAM"] == "https://api.test/v1"
    assert lines["ONCEGATE_LEASE_MS"] == "2500"
    assert lines["ONCEGATE_RETENTION_S"] == "86400"
    assert lines["ONCEGATE_STORE_URL"] == "rediss://me:***@redis:6379/2"
    assert CANARY not in check.stdout


@pytest.mark.parametrize("secret", ["", CANARY])
def test_a_shared_store_without_a_secret_is_said(proxies, upstream, valkey, secret):
    """A store of one's own has readers of its own: without a secret they can test guesses, and the log says so."""
    gate = proxies(upstream, valkey.url, SECRET=secret)
    assert len(gate.events("store without a secret")) == (0 if secret else 1)
    assert not proxies(upstream, SECRET=secret).events("store without a secret")


def test_check_and_serve_report_all_errors_at_once(tmp_path):
    """Every variable that is wrong has its line, no secret is repeated, and nothing starts: exit code 2."""
    env = {
        "PATH": os.environ["PATH"],
        "ONCEGATE_LISTEN": "8080",
        "ONCEGATE_LEASE_MS": "none",
        "ONCEGATE_STORE_URL": f"mysql://me:{CANARY}@host",
        "ONCEGATE_ACCESS_LOG": "some",
        "ONCEGATE_UPSTRAEM": "http://x",
        "ONCEGATE_RETENTION_S": "0",
        "ONCEGATE_TLS_KEY_FILE": "/nowhere",
    }
    for command in ("check", "serve"):
        run = oncegate(command, env=env, cwd=tmp_path)
        assert (run.returncode, run.stdout) == (2, "")
        named = [line.partition(":")[0] for line in run.stderr.splitlines()]
        assert sorted(named) == sorted([name for name in env if name.startswith("ONCEGATE_")] + ["ONCEGATE_UPSTREAM"])
        assert CANARY not in run.stderr


# Logs ...


def access_lines(proxy: Proxy) -> list[str]:
    return [line["outcome"] for line in proxy.events("request")]


@pytest.mark.parametrize("which", ["off", "notable", "all"])
async def test_the_access_log_has_what_was_asked_for(proxies, upstream, valkey, which):
    """`all` has a line for each request, `notable` leaves out plain executions and pass-through, `off` all of them."""
    gate = proxies(upstream, valkey.url, ACCESS_LOG=which, **SMALL)
    outcomes = await traffic(gate, upstream)
    await until(lambda: gate.metric("request_seconds_count") == outcomes.total())
    plain = ("executed", "passthrough")
    wanted = {
        "off": [],
        "all": outcomes.elements(),
        "notable": (one for one in outcomes.elements() if one not in plain),
    }
    assert sorted(access_lines(gate)) == sorted(wanted[which])


async def test_the_first_lines_of_a_new_installation_are_no_warnings(proxies, upstream, own_store):
    """Nothing has happened yet: whoever reads a warning here learns to read past them."""
    gate = proxies(upstream, own_store.url)
    await until(lambda: gate.events("store problem"))
    await asyncio.sleep(2 * HEALTH_S)
    assert {line["level"] for line in map(json.loads, gate.log().splitlines())} == {"info"}
    assert {line["kind"] for line in gate.events("store problem")} == {"founded"}


async def test_the_page_names_the_replicas(proxies, upstream, own_store):
    """Each process that serves on the store, by its host: also those elsewhere, until one has left."""
    first, second = (proxies(upstream, own_store.url) for _ in range(2))
    await until(lambda: f"1: {socket.gethostname()} (2 workers)" in first.admin("/")[1])
    assert second.stop() == 0
    await until(lambda: f"1: {socket.gethostname()} (1 worker)" in first.admin("/")[1], 20)


# What depends on the requests, and on the store that all tests share.
AT_ANY_TIME = (
    *("request", "store problem", "store without a secret"),
    *("outcome unknown", "upstream failed", "store failed", "overloaded"),
)


async def test_log_lines_are_objects_that_tell_and_keep_secrets(proxies, upstream, valkey):
    """Each line is one JSON object with event, level and time; no key, query or body is in any, nor a path if asked."""
    gate = proxies(upstream, valkey.url, ACCESS_LOG_PATH="false", **SMALL)
    outcomes = await traffic(gate, upstream)
    await until(lambda: len(access_lines(gate)) == outcomes.total())
    assert gate.stop() in (0, 1)
    lines = [json.loads(line) for line in gate.log().splitlines()]
    for line in lines:
        assert {"event", "level", "timestamp"} <= line.keys()
        assert time.strptime(line["timestamp"][:19], "%Y-%m-%dT%H:%M:%S")
    assert [line["event"] for line in lines if line["event"] not in AT_ANY_TIME] == [
        "serving", "requests without a credential", "shutting down", "stopped",
    ]  # fmt: skip
    requests = [line for line in lines if line["event"] == "request"]
    keyed = [line for line in requests if line["outcome"] in ("executed", "replayed", "key_reused")]
    assert all(re.fullmatch(r"[\w-]{32}", line["key_id"]) for line in keyed)
    assert len({line["key_id"] for line in requests if line["outcome"] in ("replayed", "key_reused")}) == 1
    for line in requests:
        assert line["method"] in ("GET", "POST", "PURGE", "TRACE", "")
        assert 0 <= line["upstream_ms"] <= line["duration_ms"] < 60_000
        assert isinstance(line["client_gone"], bool)
    statuses = {line["outcome"]: line["status"] for line in requests}
    assert (statuses["passthrough"], statuses["executed"], statuses["replayed"]) == (200, 200, 200)
    assert (statuses["key_reused"], statuses["key_invalid"], statuses["body_too_large"]) == (422, 400, 413)
    assert CANARY not in gate.log().lower()


async def test_an_alarm_is_an_error_in_the_log(proxies, upstream, valkey):
    """A record that fails its checks is reported as an error; what went as it should is information."""
    gate = proxies(upstream, valkey.url)
    await ask(gate.port, request())
    with valkey.client() as client:
        (name,) = client.keys("once:{*")
        client.hset(name, "meta", bytes([client.hget(name, "meta")[0]]) + bytes(200))
    answer = await ask(gate.port, request())
    assert (answer.status, answer.slug) == (500, "record-corrupt")
    await until(lambda: len(gate.events("request")) == 2)
    lines = [(line["level"], line["outcome"], line["status"]) for line in gate.events("request")]
    assert lines == [("info", "executed", 200), ("error", "record_corrupt", 500)]
    assert len(upstream.received) == 1


async def hang_up(_: object, __: object, writer: asyncio.StreamWriter, ___: object) -> None:
    writer.close()


@pytest.mark.parametrize("key", ["k", None], ids=["with a key", "without"])
async def test_the_log_has_the_status_that_the_client_got(proxies, upstream, valkey, key):
    """Where the upstream sends no whole response, `status` is that of the problem: a search for 5xx finds it."""
    upstream.script = hang_up
    gate = proxies(upstream, valkey.url, CONNECT_TIMEOUT_S=1)
    answers = [await ask(gate.port, request(key=key))]
    await upstream.close()
    answers.append(await ask(gate.port, request(key=key and "other")))
    assert [answer.slug for answer in answers] == ["upstream-lost", "upstream-unreachable"]
    await until(lambda: len(gate.events("request")) == 2)
    assert [line["status"] for line in gate.events("request")] == [answer.status for answer in answers]


class ConsoleProxy(Proxy):
    """A proxy that logs for people."""

    def events(self, name: str) -> list[dict[str, str]]:
        lines = [line for line in self.log().splitlines() if f" {name} " in line]
        return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines]


async def test_the_console_format_is_for_people(upstream, valkey, tmp_path):
    """LOG_FORMAT=console writes plain lines with the same facts, without colours, also where it is no terminal."""
    gate = ConsoleProxy(upstream.url, valkey.url, tmp_path, {"LOG_FORMAT": "console"})
    try:
        gate.start()
        await ask(gate.port, request(key=CANARY))
        await until(lambda: gate.events("request"))
        (line,) = gate.events("request")
        assert (line["outcome"], line["method"], line["status"]) == ("executed", "POST", "200")
        assert gate.stop() == 0
        assert "\x1b" not in gate.log()
        assert CANARY not in gate.log()
        for text in gate.log().splitlines():
            assert re.match(r"\d{4}-\d\d-\d\dT\S+ \[\w+ *\] ", text), text
    finally:
        gate.close()
