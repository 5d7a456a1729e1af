"""The spans that a collector gets of a proxy's requests, and the trace that the API sees."""

import asyncio
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.collector import Collector, Received
from tests.conftest import Valkey
from tests.parts import (
    CHUNKED,
    OK,
    Blackhole,
    Proxy,
    RawClient,
    RawUpstream,
    Tap,
    abort,
    answering,
    ask,
    chunk,
    request,
    until,
)
from tests.zygote import Zygote, standing_proxy

DECLINED = OK.replace(b"200 OK", b"429 Too Many Requests")
RULES = """
[[rule]]
name = "charges"
path = "/v1/charges"

[[rule]]
name = "twice"
path = "/twice"
upstream_idempotent = true

[[rule]]
name = "taken-over"
path = "/taken-over"
on_unknown = "retry"

[[rule]]
name = "hooks"
path = "/hooks/*"
key = "path:2"
"""


class Trace:
    """A trace that a client began, and a request in it."""

    def __init__(self, flags: str = "01") -> None:
        self.id, self.span = f"{random.getrandbits(128):032x}", f"{random.getrandbits(64):016x}"
        self.flags = flags

    @property
    def field(self) -> str:
        return f"traceparent: 00-{self.id}-{self.span}-{self.flags}"

    def request(self, key: str = "key-1", *extra: str, body: bytes = b"{}", target: str = "/v1/charges") -> bytes:
        return request("POST", target, key, body, self.field, *extra)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield collector
    collector.close()


@pytest.fixture(scope="module")
def tracing(
    head_cache: None, collector: Collector, zygote: Zygote, shared_valkey: Valkey, tmp_path_factory
) -> Iterator[Proxy]:
    """A proxy that traces what its clients trace."""
    folder, settings = tmp_path_factory.mktemp("tracing"), {"TRACE_RATE_PER_S": 100_000, "WAIT_MAX_S": 20}
    with standing_proxy(zygote, shared_valkey.url, folder, settings, rules=RULES) as proxy:
        yield proxy


@pytest.fixture
def standing(tracing: Proxy) -> Proxy:
    return tracing


def forwarded(upstream: RawUpstream) -> list[list[str]]:
    """Return the `traceparent` of each request that the API got."""
    return [[value.decode("latin-1") for value in one.header("traceparent")] for one in upstream.received]


def parent_of(client: Received) -> list[str]:
    return [f"00-{client.trace_id}-{client.span_id}-01"]


async def test_an_execution(standing, behind, collector):
    """The API sees our client span, which is under our server span, which is under the client's span."""
    trace = Trace()
    answer = await ask(standing.port, trace.request("key-1", "tracestate: a=1,b=2", "Baggage: user=7"))
    assert answer.status == 200
    server, client = await collector.trace(trace.id, 2)
    assert (server.kind, server.name, server.parent_id) == ("server", "POST charges", trace.span)
    assert (client.kind, client.name, client.parent_id) == ("client", "POST", server.span_id)
    assert forwarded(behind) == [parent_of(client)]
    assert behind.received[0].header("tracestate") == [b"a=1,b=2"]
    assert behind.received[0].header("baggage") == [b"user=7"]
    key_id, _, fence = behind.received[0].header("oncegate-execution")[0].decode().partition("; fence=")
    attributes = server.attributes
    assert 0 < attributes.pop("oncegate.claim.duration") < 10
    assert 0 < attributes.pop("oncegate.settle.duration") < 10
    assert attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/v1/charges",
        "server.address": "api.test",
        "client.address": "127.0.0.1",
        "oncegate.outcome": "executed",
        "oncegate.rule": "charges",
        "oncegate.key_id": key_id,
        "oncegate.fence": int(fence),
        "oncegate.request_id": behind.received[0].header("x-request-id")[0].decode(),
        "oncegate.settlement": "stored",
    }
    assert client.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.full": f"{behind.url}/v1/charges",
        "server.address": "127.0.0.1",
        "server.port": behind.port,
    }
    assert server.times[0] < client.times[0] < client.times[1] < server.times[1]
    assert server.resource["service.name"] == "oncegate"


@pytest.fixture
async def executed(standing, behind, collector) -> Received:
    """The server span of a request that was executed under `key-1`."""
    trace = Trace()
    await ask(standing.port, trace.request())
    server, _ = await collector.trace(trace.id, 2)
    assert server.links == []
    return server


async def test_a_replay_leads_to_its_original(standing, behind, collector, executed):
    """It has no client span, and a link to the server span of the request that was executed."""
    for _ in range(2):
        trace = Trace()
        await ask(standing.port, trace.request())
        (server,) = await collector.trace(trace.id, 1)
        assert server.attributes["oncegate.outcome"] == "replayed"
        assert server.links == [(executed.trace_id, executed.span_id)]
        assert {"oncegate.settle.duration", "oncegate.fence"}.isdisjoint(server.attributes)
    assert len(behind.received) == 1


async def test_a_replay_of_what_was_not_traced_has_no_link(standing, behind, collector):
    await ask(standing.port, Trace("00").request())
    trace = Trace()
    await ask(standing.port, trace.request())
    (server,) = await collector.trace(trace.id, 1)
    assert (server.attributes["oncegate.outcome"], server.links) == ("replayed", [])


async def test_no_span_has_a_secret(standing, behind, collector):
    """Neither the key nor a credential, the query, a field or a body."""
    trace, secret = Trace(), "s3cr3t"
    fields = (
        f"Authorization: Bearer {secret}",
        f"Cookie: a={secret}",
        f"tracestate: a={secret}",
        f"baggage: a={secret}",
    )
    target = f"/v1/charges?token={secret}"
    behind.script = answering(OK.replace(b"text/plain", f"text/plain; a={secret}".encode()))
    await ask(standing.port, trace.request(secret, *fields, body=secret.encode(), target=target))
    spans = await collector.trace(trace.id, 2)
    assert [span.attributes["oncegate.outcome"] for span in spans[:1]] == ["executed"]
    assert secret not in repr(spans)


async def test_no_span_has_a_key_that_is_in_the_path(standing, behind, collector):
    """The path is left out under such a rule, as in the access log: of the request, and of what was sent for it."""
    trace = Trace()
    await ask(standing.port, request("POST", "/hooks/s3cr3t", None, b"{}", trace.field))
    server, client = await collector.trace(trace.id, 2)
    assert server.attributes["oncegate.outcome"] == "executed"
    assert client.attributes["http.response.status_code"] == 200
    assert "s3cr3t" not in repr([server, client])


async def test_each_request_of_a_connection_has_its_own(standing, behind, collector):
    """Also under a known head, where only the values of fields differ."""
    traces = [Trace(random.choice(["01", "00"])) for _ in range(30)]
    client = await RawClient.open(standing.port)
    for number, trace in enumerate(traces):
        assert await client.ask(trace.request(f"key-{number}"))
    client.close()
    for trace, came in zip(traces, forwarded(behind), strict=True):
        if trace.flags == "01":
            assert came == parent_of((await collector.trace(trace.id, 2))[1])
        else:
            assert came == [trace.field.removeprefix("traceparent: ")]


@pytest.mark.parametrize(
    ("response", "outcome", "status", "settlement"),
    [(DECLINED, "released", 429, "released"), (OK.replace(b"200", b"504"), "unknown", 504, "unknown")],
)
async def test_what_the_api_declines_or_leaves_open(standing, behind, collector, response, outcome, status, settlement):
    """Nothing is wrong with the server of a 429; to its client each is an error."""
    behind.script = answering(response)
    trace = Trace()
    await ask(standing.port, trace.request())
    server, client = await collector.trace(trace.id, 2)
    assert server.attributes["oncegate.outcome"] == outcome
    assert server.attributes["oncegate.settlement"] == settlement
    assert client.attributes["http.response.status_code"] == status
    assert client.attributes["error.type"] == str(status)
    assert (server.is_error, client.is_error) == (status >= 500, True)


async def hang_up(_: object, __: object, writer: asyncio.StreamWriter, ___: object) -> None:
    abort(writer)


async def test_no_response(standing, behind, collector):
    """An outcome that nobody knows: the attempt and the request are errors, and so are the refusals that follow."""
    behind.script = hang_up
    first, second = Trace(), Trace()
    assert (await ask(standing.port, first.request())).status == 502
    server, client = await collector.trace(first.id, 2)
    assert server.attributes["oncegate.settlement"] == "unknown"
    assert server.attributes["oncegate.outcome"] == client.attributes["error.type"] == "upstream_lost"
    assert "http.response.status_code" not in client.attributes
    assert server.is_error
    assert client.is_error
    assert (await ask(standing.port, second.request())).status == 409
    (refused,) = await collector.trace(second.id, 1)
    assert refused.attributes["oncegate.outcome"] == "outcome_unknown"
    assert refused.links == [(server.trace_id, server.span_id)]
    assert not refused.is_error


async def test_a_refusal(standing, behind, collector, executed):
    """A key with another body: no attempt, and a link to the request that has the key."""
    trace = Trace()
    assert (await ask(standing.port, trace.request(body=b"[]"))).status == 422
    (server,) = await collector.trace(trace.id, 1)
    assert server.attributes["oncegate.outcome"] == "key_reused"
    assert server.links == [(executed.trace_id, executed.span_id)]
    assert len(behind.received) == 1


async def test_a_duplicate_that_waits(standing, behind, collector):
    """Its wait is a part of its span."""
    tap, original, duplicate = Tap(), Trace(), Trace()
    behind.script = tap.script
    first = asyncio.ensure_future(ask(standing.port, original.request()))
    await until(lambda: behind.received)
    second = asyncio.ensure_future(ask(standing.port, duplicate.request("key-1", "Prefer: wait=10")))
    await until(lambda: standing.metric("waiting") == 1)
    tap.end(OK)
    assert [(await one).status for one in (first, second)] == [200, 200]
    (server,) = await collector.trace(duplicate.id, 1)
    executed, _ = await collector.trace(original.id, 2)
    assert server.attributes["oncegate.outcome"] == "replayed"
    assert server.links == [(executed.trace_id, executed.span_id)]
    assert server.attributes["oncegate.wait.duration"] > 0


async def test_each_attempt_has_a_span(standing, behind, collector):
    """An API that recognizes keys gets a lost request again, from another span."""
    trace, tries = Trace(), iter([hang_up, answering(OK)])

    async def script(upstream, reader, writer, received):
        await next(tries)(upstream, reader, writer, received)

    behind.script = script
    assert (await ask(standing.port, trace.request(target="/twice"))).status == 200
    server, first, second = await collector.trace(trace.id, 3)
    assert forwarded(behind) == [parent_of(first), parent_of(second)]
    assert first.span_id != second.span_id
    assert [one.parent_id for one in (first, second)] == [server.span_id] * 2
    assert (first.attributes["error.type"], "error.type" in second.attributes) == ("upstream_lost", False)
    assert second.attributes["http.request.resend_count"] == 1
    assert first.times[1] <= second.times[0]
    assert not server.is_error


async def test_a_key_that_is_taken_over(standing, behind, collector):
    """Two executions of one key: the second has a higher fence, and a link to the first."""
    first, second = Trace(), Trace()
    behind.script = hang_up
    await ask(standing.port, first.request(target="/taken-over"))
    behind.script = answering(OK)
    assert (await ask(standing.port, second.request(target="/taken-over"))).status == 200
    (one, _), (two, client) = await collector.trace(first.id, 2), await collector.trace(second.id, 2)
    assert one.attributes["oncegate.key_id"] == two.attributes["oncegate.key_id"]
    assert one.attributes["oncegate.fence"] < two.attributes["oncegate.fence"]
    assert two.attributes["oncegate.outcome"] == "executed"
    assert two.links == [(one.trace_id, one.span_id)]
    assert forwarded(behind)[-1] == parent_of(client)


async def test_a_stream(standing, behind, collector):
    """The spans last as long as the response."""
    tap, trace = Tap(), Trace()
    behind.script = tap.script
    asked = asyncio.ensure_future(ask(standing.port, trace.request()))
    tap.send(CHUNKED, chunk(b"a"))
    await asyncio.sleep(0.2)
    tap.end(chunk(b"b"), b"0\r\n\r\n")
    assert (await asked).body == b"ab"
    server, client = await collector.trace(trace.id, 2)
    assert client.times[1] - client.times[0] > 150e6
    assert server.attributes["oncegate.settlement"] == "stored"


async def test_a_stream_that_breaks(standing, behind, collector):
    async def script(_: object, __: object, writer: asyncio.StreamWriter, ___: object) -> None:
        writer.write(CHUNKED + chunk(b"a" * 100_000))
        await writer.drain()
        writer.close()

    behind.script = script
    trace = Trace()
    assert not (await ask(standing.port, trace.request())).complete
    server, client = await collector.trace(trace.id, 2)
    assert server.attributes["error.type"] == client.attributes["error.type"] == "truncated"
    assert server.attributes["oncegate.settlement"] == "unknown"
    assert client.attributes["http.response.status_code"] == 200


async def test_a_client_that_leaves(standing, behind, collector):
    """The execution goes on, and its spans say how it ended."""
    tap, trace = Tap(), Trace()
    behind.script = tap.script
    client = await RawClient.open(standing.port)
    client.writer.write(trace.request())
    await until(lambda: behind.received)
    client.reset()
    tap.end(OK)
    server, _ = await collector.trace(trace.id, 2)
    assert server.attributes["oncegate.outcome"] == "executed"
    assert server.attributes["oncegate.settlement"] == "stored"


HOSTILE = [
    ["traceparent: 00-00000000000000000000000000000000-00f067aa0ba902b7-01"],
    ["traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"],
    ["traceparent: ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"],
    ["traceparent: 00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01"],
    ["traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01" + "-x" * 4000],
    ["traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"] * 2,
    ["traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "TRACEPARENT: x"],
    ["traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01, x"],
    ["traceparent: \xff"],
    ["traceparent:"],
]


@pytest.mark.parametrize("lines", [[], *HOSTILE])
async def test_what_is_not_traced_passes_unchanged(standing, behind, collector, lines):
    """A malformed field is the API's to judge, as without tracing; the state and the baggage pass with it."""
    client = await RawClient.open(standing.port)
    for number in range(3):
        answer = await client.ask(request("POST", "/v1/charges", f"key-{number}", b"{}", *lines, "tracestate: a=1"))
        assert answer
        assert answer.status == 200
    client.close()
    sent = [line.partition(":")[2].strip() for line in lines]
    assert forwarded(behind) == [sent] * len(behind.received)
    assert [one.header("tracestate") for one in behind.received] == [[b"a=1"]] * len(behind.received)


async def test_a_trace_of_our_own(proxies, upstream, valkey, collector):
    """Requests without a trace, or with a malformed one, begin one. No state of another one goes with it."""
    proxy = proxies(upstream, valkey.url, TRACE_RATE_PER_S=1000, TRACE_RATIO=1)
    for number, lines in enumerate([[], *HOSTILE]):
        answer = await ask(
            proxy.port, request("POST", "/", f"key-{number}", b"{}", *lines, "tracestate: a=1", "baggage: b=2")
        )
        assert answer.status == 200
        (parent,) = forwarded(upstream)[-1]
        version, trace_id, _, flags = parent.split("-")
        assert (version, flags) == ("00", "01")
        assert upstream.received[-1].header("tracestate") == []
        assert upstream.received[-1].header("baggage") == [b"b=2"]
        server, client = await collector.trace(trace_id, 2)
        assert parent_of(client) == [parent]
        assert (server.parent_id, server.name) == ("", "POST default")
    unsampled = Trace("00")
    await ask(proxy.port, unsampled.request("other"))
    assert forwarded(upstream)[-1] == [unsampled.field.removeprefix("traceparent: ")]


async def test_a_request_without_a_claim(proxies, upstream, collector):
    """Where a store that is down is bypassed, the API is called all the same, and sees the trace."""
    settings = {"TRACE_RATE_PER_S": 1000, "ON_STORE_DOWN": "bypass", "STORE_TIMEOUT_MS": 100}
    proxy = proxies(upstream, "redis://127.0.0.1:1", **settings)
    first, second = Trace(), Trace()
    assert (await ask(proxy.port, first.request())).status == 200
    server, client = await collector.trace(first.id, 2)
    assert forwarded(upstream) == [parent_of(client)]
    assert server.attributes["oncegate.outcome"] == "unguarded"
    assert client.attributes["http.response.status_code"] == 200
    upstream.script = hang_up
    assert (await ask(proxy.port, second.request())).status == 502
    server, client = await collector.trace(second.id, 2)
    assert client.attributes["error.type"] == server.attributes["error.type"] == "upstream_lost"


async def test_a_client_cannot_have_more_traced_than_the_rate(proxies, upstream, valkey, collector):
    """Every client may say that it records: what is beyond the rate passes unchanged, and is counted."""
    proxy = proxies(upstream, valkey.url, TRACE_RATE_PER_S=0.001)
    traces = [Trace() for _ in range(30)]
    client = await RawClient.open(proxy.port)
    for number, trace in enumerate(traces):
        assert await client.ask(trace.request(f"key-{number}"))
    client.close()
    assert [[one.field.removeprefix("traceparent: ")] for one in traces][1:] == forwarded(upstream)[1:]
    assert forwarded(upstream)[0] == parent_of((await collector.trace(traces[0].id, 2))[1])
    assert proxy.metric("traces_limited_total") == 29
    await until(lambda: proxy.metric('spans_total{end="exported"}') == 2)
    assert not any(collector.of(one.id) for one in traces[1:])


# Metrics ...

OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def exemplars(proxy: Proxy) -> dict[str, str]:
    """Return the trace of each sample that has one, in OpenMetrics; the labels are those of the sample."""
    url = f"http://127.0.0.1:{proxy.admin_port}/metrics"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": OPEN_METRICS}), timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        families = [*text_string_to_metric_families(answer.read().decode())]
    return {
        f"{sample.name}{sample.labels}": sample.exemplar.labels["trace_id"]
        for family in families
        for sample in family.samples
        if sample.exemplar
    }


@pytest.mark.parametrize("workers", [1, 2])
async def test_metrics_lead_to_traces(proxies, upstream, valkey, workers):
    """A bucket of the latency, an outcome and an unknown key have the newest trace; nothing else has one."""
    proxy = proxies(upstream, valkey.url, TRACE_RATE_PER_S=1000, WORKERS=workers)
    await ask(proxy.port, Trace("00").request("key-0"))
    assert exemplars(proxy) == {}
    upstream.script = hang_up
    first, second = Trace(), Trace()
    for number, trace in enumerate((first, second)):
        await ask(proxy.port, trace.request(f"lost-{number}"))
    found = exemplars(proxy)
    assert found.pop("oncegate_settled_total{'settlement': 'unknown'}") == second.id
    assert found.pop("oncegate_requests_total{'outcome': 'upstream_lost'}") == second.id
    assert found
    assert all(name.startswith("oncegate_request_seconds_bucket") for name in found)
    assert second.id in found.values()
    assert set(found.values()) <= {first.id, second.id}
    assert first.id not in proxy.admin("/metrics")[1]


# Its life ...


@pytest.fixture
def late(collector, monkeypatch) -> None:
    """Spans leave at the end of a process only."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_drain_sends_what_is_waiting(proxies, upstream, valkey, collector, late, workers):
    """Each worker its own, also of a request that runs when the drain begins."""
    proxy = proxies(upstream, valkey.url, TRACE_RATE_PER_S=1000, WORKERS=workers)
    traces = [Trace() for _ in range(20)]
    for number, trace in enumerate(traces):
        await ask(proxy.port, trace.request(f"key-{number}"))
    tap, last = Tap(), Trace()
    upstream.script = tap.script
    asked = asyncio.ensure_future(ask(proxy.port, last.request("last")))
    await until(lambda: len(upstream.received) == 21)
    assert not any(collector.of(one.id) for one in traces)
    proxy.signal(15)
    await until(lambda: "shutting down" in proxy.log())
    tap.end(OK)
    assert (await asked).status == 200
    assert await asyncio.to_thread(proxy.process.wait, 30) == 0
    for trace in (*traces, last):
        await collector.trace(trace.id, 2)
    instances = {span.resource["service.instance.id"] for one in traces for span in collector.of(one.id)}
    assert 1 <= len(instances) <= workers


async def test_a_collector_that_is_away_costs_no_request(proxies, upstream, valkey, monkeypatch):
    """Connecting to it hangs. Requests are answered, the end comes in time, and the spans are counted as lost."""
    hole = Blackhole()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", hole.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "20")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    proxy = proxies(upstream, valkey.url, TRACE_RATE_PER_S=1000, TRACE_RATIO=1)
    for number in range(50):
        assert (await ask(proxy.port, request(key=f"key-{number}"), seconds=5)).status == 200
    assert proxy.metric('spans_total{end="lost"}') >= 80
    assert proxy.metric('spans_total{end="exported"}') == 0
    assert await asyncio.to_thread(proxy.stop, 10) == 0
    warnings = proxy.events("spans are lost")
    assert [one["level"] for one in warnings] == ["warning"]
    hole.close()


async def test_a_collector_that_refuses_is_said_once(proxies, upstream, valkey, collector):
    collector.status = 400
    proxy = proxies(upstream, valkey.url, TRACE_RATE_PER_S=1000, TRACE_RATIO=1)
    for number in range(3):
        await ask(proxy.port, request(key=f"key-{number}"))
        await until(lambda number=number: proxy.metric('spans_total{end="lost"}') == 2 * number + 2)
    (warning,) = proxy.events("spans are lost")
    assert "400" in warning["reason"]
    collector.status = 200
    await ask(proxy.port, request(key="key-4"))
    await until(lambda: proxy.metric('spans_total{end="exported"}') == 2)


@pytest.fixture
def without_the_extra(tmp_path: Path) -> dict[str, str]:
    """An environment in which the SDK is not installed."""
    package = tmp_path / "lib" / "opentelemetry"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    return {"PYTHONPATH": os.pathsep.join((str(package.parent), *sys.path))}


def started(command: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command that is to end by itself, with tracing switched on."""
    settings = {"UPSTREAM": "http://127.0.0.1:1", "LISTEN": "127.0.0.1:0", "ADMIN_LISTEN": "127.0.0.1:0"}
    settings |= {"STORE_URL": "redis://127.0.0.1:1", "TRACE_RATE_PER_S": "1"}
    env = os.environ | {f"ONCEGATE_{name}": value for name, value in settings.items()} | env
    words = [sys.executable, "-m", "oncegate", command]
    return subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("command", "workers"), [("serve", "1"), ("serve", "2"), ("check", "1")])
def test_without_the_extra_it_does_not_start(without_the_extra, tmp_path, command, workers):
    """One sentence says what to install."""
    ended = started(command, tmp_path, ONCEGATE_WORKERS=workers, **without_the_extra)
    assert ended.returncode == 2
    assert "pip install 'oncegate[otel]'" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_variable_that_cannot_be_used_stops_the_start(tmp_path, command):
    ended = started(command, tmp_path, OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
    assert ended.returncode == 2
    assert "OTEL_*: the protocol must be http/protobuf, not grpc" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_configuration_that_can_be_used(tmp_path):
    ended = started("check", tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    assert (ended.returncode, ended.stderr.count("OTEL")) == (0, 0)
    assert "ONCEGATE_TRACE_RATE_PER_S = 1" in ended.stdout
