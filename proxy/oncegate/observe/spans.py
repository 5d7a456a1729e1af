"""Spans for OpenTelemetry: made of requests that have ended, and sent to a collector in the background.

Needs the extra `otel`. Attributes have the names of OpenTelemetry's semantic conventions for HTTP; oncegate's own
begin with `oncegate.`.
"""

import asyncio
import contextlib
import functools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from oncegate import __version__
from oncegate.keys.digests import url_safe_base64
from oncegate.messages.traceparent import TraceContext
from oncegate.observe.outcome import Outcome, RequestReport
from oncegate.observe.tracing import Attempt, Trace
from oncegate.settings.addresses import DEFAULT_PORTS
from oncegate.settings.errors import SettingsError

_SCOPE = InstrumentationScope("oncegate", __version__)
# The methods of RFC 9110 and RFC 5789. Others could be any word.
_METHODS = frozenset(("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"))
# Outcomes in which the client got no whole response, whatever status it saw.
_BROKEN = frozenset((Outcome.TRUNCATED, Outcome.BROKEN_OFF, Outcome.ANSWER_NOT_STORED, Outcome.FAILED))
# Outcomes with a status of the API's.
_FROM_API = frozenset((Outcome.EXECUTED, Outcome.REPLAYED, Outcome.RELEASED, Outcome.UNKNOWN))
_OK, _ERROR = Status(StatusCode.UNSET), Status(StatusCode.ERROR)
_POLL_S = 0.02
# The most spans of a request to the collector, unless OTEL_BSP_MAX_EXPORT_BATCH_SIZE says it. To encode them takes
# 6 ms of the interpreter, which the event loop waits for.
_BATCH_SPANS = 128

Attributes = dict[str, str | int | float | bool]


def spans_of(trace: Trace, report: RequestReport, resource: Resource, path: str) -> list[ReadableSpan]:
    """Return the server span of a request that ends now, and a client span for each of its attempts.

    `path`: of its target, empty where it is not to be seen.
    """

    def span(
        name: str, context: TraceContext, parent: SpanContext | None, times_s: tuple[float, float], **more: Any
    ) -> ReadableSpan:
        # The SDK asks users to start spans with its tracer. That costs ten times as much on the event loop as these
        # values, which are all that an exporter reads (30 us, measured).
        began_ns, ended_ns = (trace.epoch_ns + int(one * 1e9) for one in times_s)
        return ReadableSpan(
            name, _span_context(context), parent, resource,
            start_time=began_ns, end_time=ended_ns, instrumentation_scope=_SCOPE, **more,
        )  # fmt: skip

    ended_s = time.perf_counter()
    method = report.method if report.method in _METHODS else "HTTP"
    attributes = _server_attributes(trace, report, path)
    server = span(
        f"{method} {report.rule or 'default'}",
        trace.own,
        None if trace.parent is None else _span_context(trace.parent, is_remote=True),
        (trace.began_s, ended_s),
        kind=SpanKind.SERVER,
        attributes=attributes,
        links=[Link(_span_context(link, is_remote=True)) for link in trace.links],
        status=_ERROR if "error.type" in attributes else _OK,
    )
    clients = [
        span(
            method, one.context, server.context, (one.began_s, one.ended_s or ended_s), kind=SpanKind.CLIENT,
            attributes=_client_attributes(report, trace.upstream + path, one, number),
            status=_ERROR if _error_type(one) else _OK,
        )
        for number, one in enumerate(trace.attempts)
    ]  # fmt: skip
    return [server, *clients]


def _span_context(context: TraceContext, *, is_remote: bool = False) -> SpanContext:
    return SpanContext(context.trace_id, context.span_id, is_remote, TraceFlags(context.flags))


def _method(report: RequestReport) -> Attributes:
    if report.method in _METHODS:
        return {"http.request.method": report.method}
    return {"http.request.method": "_OTHER", "http.request.method_original": report.method}


def _server_attributes(trace: Trace, report: RequestReport, path: str) -> Attributes:
    asked, outcome, attributes = report.asked, report.outcome, _method(report)
    if asked is not None:
        attributes |= _address(asked.host)
        attributes |= {"url.scheme": asked.scheme, "client.address": asked.client}
        if path:
            attributes["url.path"] = path
        if request_id := asked.request_id:
            attributes["oncegate.request_id"] = request_id
    attributes["oncegate.outcome"] = outcome.label
    attributes["oncegate.key_id"] = url_safe_base64(report.key).decode()
    for step, seconds in trace.spent_s.items():
        attributes[f"oncegate.{step}.duration"] = seconds
    if trace.fence:
        attributes["oncegate.fence"] = trace.fence
    if report.rule:
        attributes["oncegate.rule"] = report.rule
    if report.status:
        attributes["http.response.status_code"] = report.status
    if report.settlements:
        attributes["oncegate.settlement"] = report.settlements[0].label
    if report.status >= 500 or outcome in _BROKEN:
        attributes["error.type"] = str(report.status) if outcome in _FROM_API else outcome.label
    return attributes


def _client_attributes(report: RequestReport, url: str, attempt: Attempt, number: int) -> Attributes:
    attributes, (scheme, _, rest) = _method(report), url.partition("://")
    attributes |= _address(rest.partition("/")[0], DEFAULT_PORTS[scheme])
    attributes["url.full"] = url
    if attempt.status:
        attributes["http.response.status_code"] = attempt.status
    if number:
        attributes["http.request.resend_count"] = number
    if error := _error_type(attempt):
        attributes["error.type"] = error
    return attributes


def _error_type(attempt: Attempt) -> str:
    """Return what failed in an attempt, empty for nothing; to a client every status from 400 on is an error."""
    return attempt.error or (str(attempt.status) if attempt.status >= 400 else "")


# Hosts come from clients: the cache is bounded.
@functools.lru_cache(256)
def _address(authority: str, default_port: int = 0) -> Attributes:
    """Return the attributes of a server at `host`, `host:port` or `[address]:port`; not to be changed."""
    host, _, port = authority.rpartition(":") if authority[-1:] != "]" else (authority, "", "")
    if not port.isdecimal() or len(port) > 5:
        host, port = authority, ""
    attributes: Attributes = {"server.address": host.strip("[]")}
    return attributes | {"server.port": int(port or default_port)} if port or default_port else attributes


class _Counted(SpanExporter):
    """An exporter that tells, on its own thread, what became of each batch."""

    def __init__(self, exporter: SpanExporter, ended: Callable[[int, bool], None]) -> None:
        self._exporter, self._ended = exporter, ended

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            self._ended(len(spans), result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _Reason(logging.Handler):
    """Keeps the last sentence that the SDK logs, which would be several for each batch that a dead collector misses."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        # A header of OTEL_EXPORTER_OTLP_HEADERS is a secret, also where it is malformed.
        self.text = "a header is malformed" if "Header" in record.msg else record.getMessage()


class SpanExport:
    """Sends the spans of one worker to a collector, from a thread of its own.

    A request waits for none of it: what finds the queue full is lost, and counted. `count` is called with what became
    of spans, `exported` or `lost`, and their number.
    """

    def __init__(
        self, warn: Callable[..., None], count: Callable[[str, float], None], exporter: SpanExporter | None = None
    ) -> None:
        """`exporter`: in place of that of OTLP, which the variables OTEL_EXPORTER_OTLP_* describe.

        Raises SettingsError for a variable of OpenTelemetry that the SDK does not take; it would use its default.
        """
        self._warn, self._count, self._loop = warn, count, asyncio.get_running_loop()
        self._pending, self._is_failing = 0, False
        with _sdk_says() as self._reason:
            self._max_pending = int(os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE") or 2048)
            counted = _Counted(exporter or _otlp_exporter(), self._ended_elsewhere)
            batch = None if "OTEL_BSP_MAX_EXPORT_BATCH_SIZE" in os.environ else min(_BATCH_SPANS, self._max_pending)
            self._processor = BatchSpanProcessor(counted, max_export_batch_size=batch)
            self._resource = _resource()

    def add(self, trace: Trace, report: RequestReport, *, shows_path: bool) -> None:
        """Take a traced request that ends now. `shows_path`: its path may be seen."""
        path = report.asked.path if shows_path and report.asked is not None else ""
        spans = spans_of(trace, report, self._resource, path)
        if self._pending + len(spans) > self._max_pending:
            self._lose(len(spans), "the queue is full")
            return
        self._pending += len(spans)
        for span in spans:
            self._processor.on_end(span)

    def _ended_elsewhere(self, number: int, is_exported: bool) -> None:
        """Take a batch's end on the exporter's thread."""
        # A loop that is closed has counted its last.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended, number, is_exported)

    def _ended(self, number: int, is_exported: bool) -> None:
        self._pending -= number
        if is_exported:
            self._count("exported", number)
            self._is_failing = False
        else:
            self._lose(number, self._reason.text)

    def _lose(self, number: int, reason: str) -> None:
        self._count("lost", number)
        if not self._is_failing:
            self._is_failing = True
            self._warn("spans are lost", reason=reason)

    async def close(self, seconds: float) -> None:
        """Send what is waiting, for so long at most; what is left is lost."""
        threading.Thread(target=self._processor.shutdown, daemon=True).start()
        deadline_s = self._loop.time() + seconds
        while self._pending and self._loop.time() < deadline_s:
            await asyncio.sleep(_POLL_S)
        if self._pending:
            self._lose(self._pending, "the proxy ended")


def check_variables() -> None:
    """Raise SettingsError for a variable of OpenTelemetry that the SDK does not take."""
    with _sdk_says():
        BatchSpanProcessor(_otlp_exporter()).shutdown()  # type: ignore[no-untyped-call]


def _otlp_exporter() -> SpanExporter:
    """Return the exporter. Raises ValueError for what only a request would find out."""
    protocol, endpoint = _variable("PROTOCOL") or "http/protobuf", _variable("ENDPOINT") or "http://"
    if protocol != "http/protobuf":
        raise ValueError(f"the protocol must be http/protobuf, not {protocol}")
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError("the endpoint must be an http:// or https:// URL")
    for name in ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"):
        if (file := _variable(name)) and not os.access(file, os.R_OK):
            raise ValueError(f"the file {file} cannot be read")
    return OTLPSpanExporter()


def _variable(name: str) -> str:
    """Return a variable for traces, or that for all signals."""
    return os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}", "")


@contextlib.contextmanager
def _sdk_says() -> Iterator[_Reason]:
    """Keep what the SDK logs, from now on, for a line of our own. What it says in here is an error: SettingsError."""
    reason, logger = _Reason(), logging.getLogger("opentelemetry")
    logger.handlers, logger.propagate = [reason], False
    try:
        yield reason
    except ValueError as error:
        raise SettingsError([f"OTEL_*: {error}"]) from error
    if reason.text:
        raise SettingsError([f"OTEL_*: {reason.text}"])


def _resource() -> Resource:
    """Return what every span says of this process; OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME win."""
    own = {
        "service.name": "oncegate",
        "service.version": __version__,
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
    }
    resource = Resource.create(own).merge(OTELResourceDetector().detect())
    return _HashedOnce(resource.attributes, resource.schema_url)


class _HashedOnce(Resource):
    """A resource that knows its hash. The encoder asks for it for each span, and the SDK writes JSON for that."""

    _hash = 0

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)

    def __hash__(self) -> int:
        self._hash = self._hash or super().__hash__()
        return self._hash
