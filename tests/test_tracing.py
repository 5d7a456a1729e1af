"""Which requests are traced, and the spans that are made of one."""

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from oncegate.messages.traceparent import TraceContext, parse_traceparent, unpacked, with_traceparent
from oncegate.observe.labels import SettlementLabel
from oncegate.observe.outcome import BY_LABEL, Outcome, RequestReport
from oncegate.observe.spans import SpanExport
from oncegate.observe.tracing import Tracing, new_trace
from oncegate.settings.errors import SettingsError
from tests.parts import until

TRACE, SPAN = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
PARENT = TraceContext(TRACE, SPAN, 1)
SAMPLED = b"00-%032x-%016x-01" % (TRACE, SPAN)
UNSAMPLED = SAMPLED[:-2] + b"00"


@dataclass(frozen=True)
class Asked:
    """A request, as far as its spans say what it was."""

    path: str = "/charges"
    client: str = "203.0.113.9"
    scheme: str = "http"
    host: str = "api.test:8080"
    request_id: str = "req-7"
    trace_id: str = ""
    problem: None = None


REPORT = RequestReport(Outcome.EXECUTED, 200, "POST", b"k" * 24, rule="charges", asked=Asked())


Sampled = tuple[TraceContext, TraceContext | None]

# The field ...


@pytest.mark.parametrize(
    ("value", "flags"),
    [(SAMPLED, 1), (UNSAMPLED, 0), (SAMPLED[:-2] + b"ff", 255), (b"cc" + SAMPLED[2:] + b"-and-more", 1)],
)
def test_a_traceparent_names_a_span(value, flags):
    assert parse_traceparent(value) == TraceContext(TRACE, SPAN, flags)


MALFORMED = [
    b"",
    b"00",
    b"ff" + SAMPLED[2:],
    b"0" + SAMPLED,
    SAMPLED + b"-more",
    SAMPLED + b"0" * 5000,
    SAMPLED.upper(),
    b"00-%032x-%016x-01" % (0, SPAN),
    b"00-%032x-%016x-01" % (TRACE, 0),
    SAMPLED.replace(b"-", b"_"),
    SAMPLED[:-1],
    SAMPLED + b",",
    SAMPLED + b", " + SAMPLED,
    SAMPLED.replace(b"4b", b"\xd9\xa4", 1),
]


@pytest.mark.parametrize("value", MALFORMED)
def test_what_is_none_begins_a_new_trace(value):
    """Nothing that a client writes there fails, or gets a part of it into a trace."""
    assert parse_traceparent(value) is None


def test_a_record_keeps_a_span():
    assert unpacked(PARENT.packed()) == PARENT
    assert len(PARENT.packed()) == 25
    assert [unpacked(kept) for kept in (b"", b"x" * 24, b"x" * 26)] == [None] * 3


HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nTraceParent: %b\r\ntracestate: a=1\r\nTRACEPARENT:x\r\nbaggage: b=2\r\n"


def test_the_forwarded_head_names_our_span():
    """Each field of the client is replaced, in any case. The state stays with its trace, and not with a new one."""
    own = b"traceparent: 00-%032x-%016x-01\r\n" % (TRACE, 7)
    kept = b"POST / HTTP/1.1\r\nHost: a\r\ntracestate: a=1\r\nbaggage: b=2\r\n" + own
    head = HEAD % SAMPLED
    assert with_traceparent(head, replace_span(7), continues=True) == kept
    assert with_traceparent(head, replace_span(7), continues=False) == kept.replace(b"tracestate: a=1\r\n", b"")


def replace_span(span_id: int) -> TraceContext:
    return PARENT._replace(span_id=span_id)


# The decision ...


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Decisions:
    """What is decided about one request after another, each with a random number of its own."""

    def __init__(self, rate_per_s: float = 10, ratio: float = 0.0) -> None:
        self.clock, self.limited = Clock(), 0
        self.tracing = Tracing(rate_per_s, ratio, self._limit, self.clock)

    def _limit(self) -> None:
        self.limited += 1

    def __call__(self, traceparent: bytes) -> Sampled | None:
        return self.tracing.sample(traceparent, random.random())


def sampled(decide: Callable[[bytes], Sampled | None], value: bytes) -> Sampled:
    found = decide(value)
    assert found is not None
    return found


def test_the_clients_decision_is_followed():
    """A request belongs to its client's trace if the client records that; its own span is new."""
    decide = Decisions()
    assert decide(UNSAMPLED) is None
    assert decide(b"") is None
    (own, parent), (next_own, _) = sampled(decide, SAMPLED), sampled(decide, SAMPLED)
    assert parent == PARENT
    assert own.trace_id == TRACE
    assert own.flags == 1
    assert len({0, SPAN, own.span_id, next_own.span_id}) == 4


@pytest.mark.parametrize(("flags", "passed_on"), [(b"01", 1), (b"03", 3), (b"ff", 3)])
def test_unknown_flags_are_not_passed_on(flags, passed_on):
    own, _ = sampled(Decisions(), SAMPLED[:-2] + flags)
    assert own.flags == passed_on


@pytest.mark.parametrize("value", [UNSAMPLED, SAMPLED[:-2] + b"02", b"cc" + UNSAMPLED[2:] + b"-more"])
def test_a_client_that_does_not_record_is_followed_at_any_ratio(value):
    assert Decisions(ratio=1.0)(value) is None


@pytest.mark.parametrize("value", MALFORMED)
def test_the_own_ratio_is_for_requests_without_a_trace(value):
    """What is malformed counts as nothing."""
    assert Decisions(ratio=0.0)(value) is None
    own, parent = sampled(Decisions(ratio=1.0), value)
    assert parent is None
    assert own.trace_id not in (0, TRACE)


def test_the_ratio_is_a_share():
    decide = Decisions(rate_per_s=1_000_000, ratio=0.25)
    assert 0.2 < sum(decide(b"") is not None for _ in range(4000)) / 4000 < 0.3


@pytest.mark.parametrize("value", [SAMPLED, b""], ids=["clients that say sampled", "own ratio"])
def test_the_rate_holds_whoever_asks(value):
    """A second's worth at once, then as many as the rate allows; what is beyond is counted, not traced."""
    decide = Decisions(rate_per_s=5, ratio=1.0)
    assert sum(decide(value) is not None for _ in range(100)) == 5
    assert decide.limited == 95
    for _ in range(10):
        decide.clock.now_s += 0.1
        decide(value)
    assert decide.limited == 100
    decide.clock.now_s += 3600
    assert sum(decide(value) is not None for _ in range(100)) == 5


def test_less_than_one_a_second():
    decide = Decisions(rate_per_s=0.5)
    traced = []
    for second in range(10):
        decide.clock.now_s = 1000.0 + second
        traced += [second] if decide(SAMPLED) else []
    assert traced == [0, 2, 4, 6, 8]


# The spans ...


class Spans:
    """Spans of requests that end, in memory."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        self.exporter = exporter or InMemorySpanExporter()
        self.counts = {"exported": 0, "lost": 0}
        self.warnings: list[str] = []
        self.export = SpanExport(self._warn, self._count, self.exporter)

    def _warn(self, event: str, reason: str) -> None:
        self.warnings.append(f"{event}: {reason}")

    def _count(self, end: str, number: float) -> None:
        self.counts[end] += int(number)

    def observe(self, report: RequestReport) -> None:
        if report.trace is not None:
            self.export.add(report.trace, report, shows_path=True)

    async def of(self, report: RequestReport) -> list[ReadableSpan]:
        self.observe(report)
        await self.export.close(5)
        assert isinstance(self.exporter, InMemorySpanExporter)
        return list(self.exporter.get_finished_spans())


def traced(report: RequestReport = REPORT, ago_s: float = 0.0) -> RequestReport:
    own = PARENT._replace(span_id=9)
    return replace(report, trace=new_trace((own, PARENT), time.perf_counter() - ago_s, "https://api.internal/v1"))


async def test_an_execution_has_two_spans():
    """The server span under the client's, the client span under that, in HTTP's semantic conventions."""
    report = traced(replace(REPORT, settlements=(SettlementLabel.STORED,)), ago_s=1)
    assert report.trace
    report.trace.claimed(b"0000000000000012", b"")
    sent = report.trace.begin_attempt(b"POST / HTTP/1.1\r\n")
    report.trace.end_attempt(201, "")
    report.trace.spent("settle")
    server, client = await Spans().of(report)
    assert sent.endswith(b"\r\ntraceparent: 00-%032x-%016x-01\r\n" % (TRACE, client.context.span_id))
    assert (server.name, server.kind, client.name, client.kind) == (
        "POST charges",
        SpanKind.SERVER,
        "POST",
        SpanKind.CLIENT,
    )
    assert [span.context.trace_id for span in (server, client)] == [TRACE, TRACE]
    assert server.parent
    assert client.parent
    assert (server.parent.span_id, server.parent.is_remote, server.context.span_id) == (SPAN, True, 9)
    assert (client.parent.span_id, client.parent.is_remote) == (9, False)
    times = [server.start_time or 0, client.start_time or 0, client.end_time or 0, server.end_time or 0]
    assert times == sorted(times)
    assert 1e9 <= times[3] - times[0] < 60e9
    assert abs(time.time_ns() - times[3]) < 60e9
    attributes = dict(server.attributes or {})
    assert attributes.pop("oncegate.claim.duration") >= 0
    assert attributes.pop("oncegate.settle.duration") >= 0
    assert attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/charges",
        "server.address": "api.test",
        "server.port": 8080,
        "client.address": "203.0.113.9",
        "oncegate.outcome": "executed",
        "oncegate.key_id": "a2tra2tra2tra2tra2tra2tra2tra2tr",
        "oncegate.rule": "charges",
        "oncegate.fence": 12,
        "oncegate.request_id": "req-7",
        "oncegate.settlement": "stored",
    }
    assert dict(client.attributes or {}) == {
        "http.request.method": "POST",
        "http.response.status_code": 201,
        "url.full": "https://api.internal/v1/charges",
        "server.address": "api.internal",
        "server.port": 443,
    }
    assert [span.status.is_unset for span in (server, client)] == [True, True]


@pytest.mark.parametrize(
    ("outcome", "status", "error"),
    [
        ("executed", 200, None),
        ("executed", 404, None),
        ("executed", 500, "500"),
        ("replayed", 500, "500"),
        ("key_reused", 422, None),
        ("store_unavailable", 503, "store_unavailable"),
        ("upstream_timeout", 504, "upstream_timeout"),
        ("truncated", 200, "truncated"),
        ("client_gone", 0, None),
    ],
)
async def test_what_is_an_error_to_a_server(outcome, status, error):
    """A 5xx, and a response that is not whole."""
    (server,) = await Spans().of(traced(replace(REPORT, outcome=BY_LABEL[outcome], status=status)))
    attributes = server.attributes or {}
    assert attributes.get("error.type") == error
    assert attributes.get("http.response.status_code") == (status or None)
    assert server.status.is_unset == (error is None)


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [(200, "", None), (404, "", "404"), (503, "", "503"), (0, "upstream_lost", "upstream_lost")],
)
async def test_what_is_an_error_to_a_client(status, error, said):
    """Every status from 400 on, and no response."""
    report = traced()
    assert report.trace
    report.trace.begin_attempt(b"")
    report.trace.end_attempt(status, error)
    _, client = await Spans().of(report)
    assert (client.attributes or {}).get("error.type") == said
    assert client.status.is_unset == (said is None)


async def test_an_attempt_of_which_nothing_was_sent_is_none():
    report = traced()
    assert report.trace
    report.trace.begin_attempt(b"")
    report.trace.end_attempt(0, "")
    assert len(await Spans().of(report)) == 1


@pytest.mark.parametrize(
    ("host", "address", "port"),
    [
        ("api.test", "api.test", None),
        ("api.test:80", "api.test", 80),
        ("[::1]", "::1", None),
        ("[::1]:8080", "::1", 8080),
        ("", "", None),
        ("a:b:c", "a:b:c", None),
        ("a:999999", "a:999999", None),
    ],
)
async def test_the_address_is_the_host_that_was_asked(host, address, port):
    (server,) = await Spans().of(traced(replace(REPORT, asked=Asked(host=host))))
    assert server.attributes
    assert server.attributes["server.address"] == address
    assert server.attributes.get("server.port") == port


async def test_a_method_of_its_own_does_not_name_spans():
    """Any word can be a method: names of spans must stay few."""
    (server,) = await Spans().of(traced(replace(REPORT, method="BREW")))
    assert server.name == "HTTP charges"
    assert server.attributes
    assert server.attributes["http.request.method"] == "_OTHER"
    assert server.attributes["http.request.method_original"] == "BREW"


async def test_links_are_kept_once():
    report = traced()
    assert report.trace
    other = TraceContext(1, 2, 1)
    for kept in (other.packed(), b"", other.packed(), b"broken"):
        report.trace.met(kept)
    (server,) = await Spans().of(report)
    assert [(link.context.trace_id, link.context.span_id) for link in server.links] == [(1, 2)]


async def test_the_variables_of_opentelemetry_name_the_service(monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "payments")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    (server,) = await Spans().of(traced())
    assert server.resource.attributes["service.name"] == "payments"
    assert server.resource.attributes["deployment.environment.name"] == "test"
    assert str(os.getpid()) in str(server.resource.attributes["service.instance.id"])


# The queue ...


class Stuck(SpanExporter):
    """An exporter whose collector never answers."""

    def __init__(self) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()

    def export(self, spans: object) -> SpanExportResult:
        self.entered.set()
        self.leave.wait(30)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        pass


async def test_what_finds_the_queue_full_is_lost_and_counted(monkeypatch):
    """A collector that hangs costs a bounded queue: no request waits, and one line says so."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    spans = Spans(stuck := Stuck())
    for _ in range(100):
        spans.observe(traced())
    await until(stuck.entered.is_set)
    assert spans.counts == {"exported": 0, "lost": 92}
    assert spans.warnings == ["spans are lost: the queue is full"]
    began_s = time.perf_counter()
    await spans.export.close(0.1)
    assert time.perf_counter() - began_s < 10
    assert spans.counts == {"exported": 0, "lost": 100}
    stuck.leave.set()


class Failing(InMemorySpanExporter):
    """An exporter that fails as often as it is told to."""

    failures = 2

    def export(self, spans):  # type: ignore[no-untyped-def]
        if self.failures:
            self.failures -= 1
            raise OSError("no collector")
        return super().export(spans)


async def test_lost_batches_are_counted_and_later_ones_arrive(monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    spans = Spans(Failing())
    for lost in (1, 2):
        spans.observe(traced())
        await until(lambda lost=lost: spans.counts["lost"] == lost)
    assert len(spans.warnings) == 1
    spans.observe(traced())
    await until(lambda: spans.counts == {"exported": 1, "lost": 2})
    await spans.export.close(5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "lzma"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "secret-42"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "nowhere.pem"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
    ],
)
async def test_a_variable_that_cannot_be_used_stops_the_start(monkeypatch, name, value):
    """With a sentence, and without what a header says."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        SpanExport(print, print)
    (sentence,) = caught.value.errors
    print(sentence)
    assert sentence.startswith("OTEL_*: ")
    assert "secret" not in sentence


async def test_it_ends_with_its_loop():
    """A batch that ends after its worker is no error."""
    spans = Spans(stuck := Stuck())
    loop = asyncio.new_event_loop()
    loop.close()
    spans.export._loop = loop
    spans.observe(traced())
    threading.Thread(target=spans.export._processor.shutdown, daemon=True).start()
    await until(stuck.entered.is_set)
    stuck.leave.set()
