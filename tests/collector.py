"""A collector of OpenTelemetry: it takes spans over HTTP as protobuf, and keeps them as plain values."""

import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.parts import until

KINDS = {Span.SPAN_KIND_SERVER: "server", Span.SPAN_KIND_CLIENT: "client"}


@dataclass
class Received:
    """A span as it arrived; ids in hexadecimal digits, times in nanoseconds."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    times: tuple[int, int]
    is_error: bool
    links: list[tuple[str, str]]
    attributes: dict[str, Any]
    resource: dict[str, Any] = field(repr=False)


class Collector:
    """A loopback server; `status` is what it answers."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.requests = 0
        self.status = 200
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(collector.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def take(self, request: ExportTraceServiceRequest) -> None:
        self.requests += 1
        if self.status == 200:
            for one in request.resource_spans:
                resource = _plain(one.resource.attributes)
                self.received += [_received(span, resource) for scope in one.scope_spans for span in scope.spans]

    def of(self, trace_id: str) -> list[Received]:
        """Return the spans of a trace that are here: servers first, in the order in which they began."""
        found = [span for span in self.received if span.trace_id == trace_id]
        return sorted(found, key=lambda span: (span.kind != "server", span.times))

    async def trace(self, trace_id: str, spans: int) -> list[Received]:
        """Wait for so many spans of a trace, and return them."""
        await until(lambda: len(self.of(trace_id)) >= spans)
        found = self.of(trace_id)
        assert len(found) == spans
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _received(span: Span, resource: dict[str, Any]) -> Received:
    return Received(
        span.name,
        KINDS[span.kind],
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        (span.start_time_unix_nano, span.end_time_unix_nano),
        span.status.code == 2,
        [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        _plain(span.attributes),
        resource,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
